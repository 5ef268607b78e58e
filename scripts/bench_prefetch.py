"""Time stalled on reads: trace mode against plain policies and an oracle, paired.

    python scripts/bench_prefetch.py [--quick]

One vLLM engine per contestant, each in a process of its own (prefetch_contestant.py), all with
a quarter of the experts cached: `lru`, `lrfu`, `trace` without prefetch, `trace`, and `oracle`,
which is `trace` with a predictor that knows every routing of the round beforehand, in the next
step too.
In every round all get the same prompts, one after the other, while the others sleep; sampling
is seeded, so all must generate the same tokens and the oracle's record is exact. New prompts
every round; the first one warms caches up and does not count.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.harness import serving  # noqa: E402
from scripts.harness.engine import EngineProcess  # noqa: E402
from scripts.harness.models import ensure_model, shape_of  # noqa: E402
from scripts.harness.options import log_path, parser_of  # noqa: E402
from scripts.harness.pairing import orders  # noqa: E402
from scripts.harness.report import Bar, report_of  # noqa: E402

CONTESTANT = ROOT / "scripts" / "prefetch_contestant.py"
CONTESTANTS: dict[str, dict[str, Any]] = {
    "lrfu": {"mode": "lrfu"},
    "lru": {"mode": "lru"},
    "trace without prefetch": {"mode": "trace", "prefetch": False},
    "trace": {"mode": "trace"},
    "oracle": {"mode": "trace"},
}
"""The first one records the routing that the oracle knows."""

ENVIRONMENT = serving.ENVIRONMENT | {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
STALL_FALLS_BY = 0.40
ORACLE_SHARE = 0.60
COST = 0.02


@contextlib.contextmanager
def contestants(
    args: argparse.Namespace, model: Path, concurrency: int
) -> Iterator[dict[str, EngineProcess]]:
    """All contestants, ready."""
    with contextlib.ExitStack() as stack:
        ready: dict[str, EngineProcess] = {}
        for name, options in CONTESTANTS.items():
            log = log_path(args, f"prefetch-{name.replace(' ', '-')}-{concurrency}")
            trace = log.with_name(f"prefetch-{os.getpid()}-{len(ready)}.msgpack")
            arguments = {
                "name": name,
                "records": not ready,
                "model": str(model),
                "directory": str(log.parent),
                "concurrency": concurrency,
                "requests": args.requests,
                "tokens": args.tokens,
                "options": options
                | {
                    "cache_gb": f"{100 * args.share:g}%",
                    "store_dir": str(args.work_dir / "store"),
                    "trace_path": str(trace),
                },
            }
            ready[name] = EngineProcess(
                name,
                CONTESTANT,
                arguments,
                log=log,
                # The same tokens have the same hash in all processes.
                environment=ENVIRONMENT | {"PYTHONHASHSEED": "0"},
            )
            stack.callback(ready[name].close)
            print(f"{name} is ready", file=sys.stderr, flush=True)
        yield ready


def rounds(args: argparse.Namespace, model: Path, concurrency: int) -> list[dict[str, Any]]:
    """Per round, every contestant's figures; not those of the first, which warms up."""
    recorder, *others = CONTESTANTS
    found = []
    with contestants(args, model, concurrency) as ready:
        for number, order in enumerate(orders(others, args.repeats + 1)):
            seed = str(100 * concurrency + number)
            figures = {name: ready[name].ask(seed) for name in (recorder, *order)}
            same = len({figure["token_hash"] for figure in figures.values()}) == 1
            stalls = ", ".join(
                f"{name} {1e3 * figure['stall_s'] / figure['tokens']:.2f}"
                for name, figure in figures.items()
            )
            print(
                f"B={concurrency} round {number}: {stalls} ms stalled per token; "
                f"same tokens: {same}",
                file=sys.stderr,
                flush=True,
            )
            if number:
                found.append(
                    {
                        "concurrency": concurrency,
                        "round": number,
                        "same_tokens": same,
                        "figures": figures,
                    }
                )
    return found


def summary(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures of all rounds at one concurrency."""
    by_name: dict[str, dict[str, float]] = {}
    for name in CONTESTANTS:
        total = {
            key: sum(sample["figures"][name][key] for sample in samples)
            for key in samples[0]["figures"][name]
        }
        needs = total["hits"] + total["misses"]
        by_name[name] = {
            "stall_ms_per_token": 1e3 * total["stall_s"] / total["tokens"],
            "tokens_per_s": total["generated"] / total["seconds"],
            "hit_rate": total["hits"] / needs,
            "read_mb_per_token": total["read_bytes"] / total["tokens"] / 1e6,
            "policy_share": total["policy_s"] / total["busy_s"],
            "prefetch_share": total["prefetching_s"] / total["busy_s"],
            **{key: total[key] for key in total if key.startswith("prefetch_")},
        }

    def falls(name: str) -> list[float]:
        return [
            1.0 - sample["figures"][name]["stall_s"] / sample["figures"]["lrfu"]["stall_s"]
            for sample in samples
        ]

    def saved(name: str) -> float:
        return by_name["lrfu"]["stall_ms_per_token"] - by_name[name]["stall_ms_per_token"]

    return {
        "concurrency": samples[0]["concurrency"],
        "contestants": by_name,
        "stall_falls_by": {name: statistics.median(falls(name)) for name in CONTESTANTS},
        "share_of_oracle": saved("trace") / saved("oracle"),
        "faster_than_lrfu": statistics.median(
            sample["figures"]["lrfu"]["seconds"] / sample["figures"]["trace"]["seconds"]
            for sample in samples
        ),
        "same_tokens": all(sample["same_tokens"] for sample in samples),
        "oracle_wrong": max(sample["figures"]["oracle"]["oracle_wrong"] for sample in samples),
    }


def bars_of(found: dict[str, Any]) -> list[Bar]:
    """What issue and design ask of one concurrency."""
    b = found["concurrency"]
    # One of the two is enough: less stall, or near to what can be had at all.
    met = max(
        found["stall_falls_by"]["trace"] / STALL_FALLS_BY,
        found["share_of_oracle"] / ORACLE_SHARE,
    )
    return [
        Bar(
            f"B={b}: stall falls by 40 % of lrfu's or 60 % of what an oracle saves "
            f"({found['stall_falls_by']['trace']:.0%}, {found['share_of_oracle']:.0%}), "
            "the greater of measured / bar",
            met,
            1.0,
        ),
        Bar(f"B={b}: speed, trace / lrfu", found["faster_than_lrfu"], 1.0),
        Bar(
            f"B={b}: tracing and predicting, share of step time",
            found["contestants"]["trace"]["policy_share"],
            COST,
            at_least=False,
        ),
        Bar(f"B={b}: same tokens everywhere", float(found["same_tokens"]), 1.0),
    ]


def main() -> int:
    """Exit status 1 if a bar is missed."""
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--requests", type=int, default=8, help="prompts per round")
    parser.add_argument("--tokens", type=int, default=48, help="generated per prompt")
    parser.add_argument("--share", type=float, default=0.25, help="of the experts, cached")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.tokens = 1, 8
    model = ensure_model(args.work_dir, shape_of(args))
    samples = [rounds(args, model, concurrency) for concurrency in args.concurrency]
    found = [summary(part) for part in samples]
    bars = [bar for part in found for bar in bars_of(part)]
    report_of(
        args,
        "prefetch",
        {
            "parameters": vars(args) | {"shape": shape_of(args), "environment": ENVIRONMENT},
            "summary": found,
            "samples": [sample for part in samples for sample in part],
        },
        bars,
    )
    return int(not all(bar.met for bar in bars))


if __name__ == "__main__":
    sys.exit(main())
