"""What speculative decoding brings beside an expert cache, and what it costs.

    python -m scripts.upcycle --out build/bench/models/upcycled --dense build/bench/models/dense
    python scripts/bench_speculation.py

Two models: the upcycled SmolLM2 (scripts/upcycle), for which n-grams and the dense model that it was
made of draft; and a demo model with a layer for multi-token prediction, which has experts of its own.
Per arm: speed, how many guesses were right, and what a token cost in misses, those of a drafter's
own experts included; hits are the model's. All arms have the same bytes of cache, and record their
routing while they are timed: its replay says what the steps of an arm (a token of a request, or
several) must miss in a cache of that size, whatever was read ahead and whoever else had slots.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.demo_model.mtp import write_mtp_model  # noqa: E402
from scripts.harness.completions import prompts, take_turn  # noqa: E402
from scripts.harness.options import (  # noqa: E402
    add_server_options,
    end_on_sigterm,
    parser_of,
)
from scripts.harness.pairing import orders, spread  # noqa: E402
from scripts.harness.report import report_of  # noqa: E402
from scripts.harness.serving import (  # noqa: E402
    ENVIRONMENT,
    START_SECONDS,
    offload_options,
    start_server,
)
from scripts.upcycle.prompts import prompts as questions  # noqa: E402
from vllm_moe_offload.config import GIB  # noqa: E402
from vllm_moe_offload.plan.shapes.checkpoint import read_checkpoint  # noqa: E402
from vllm_moe_offload.plan.shapes.kernel_form import BF16, kernel_form  # noqa: E402
from vllm_moe_offload.replay.run import replay_recorded  # noqa: E402
from vllm_moe_offload.trace.routing import load_trace  # noqa: E402

MTP_SHAPE = {"layers": 9, "experts": 32, "top_k": 4, "hidden": 512, "intermediate": 512}
QUICK_MTP_SHAPE = {"layers": 3, "experts": 8, "top_k": 2, "hidden": 128, "intermediate": 128}
COUNTERS = ("hits", "misses", "draft_hits", "draft_misses", "read_bytes", "stall_seconds")
SPECULATION = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
COLUMNS = (
    "model",
    "cached",
    "drafter",
    "tokens/s",
    "x none",
    "right/draft",
    "misses/token",
    "hits",
)

Case = dict[str, Any]
Config = dict[str, Any] | None

console = Console()


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, what drafts for it, and what it is asked.

    Attributes:
        name: of the model.
        model: its checkpoint.
        drafters: ``--speculative-config`` by name; None is without.
        texts: what it is asked.
        warm_up: what it is asked before.
    """

    name: str
    model: Path
    drafters: dict[str, Config]
    texts: list[str]
    warm_up: str

    @property
    def expert_bytes(self) -> int:
        """Of all the model's experts, without a drafter's."""
        shape = read_checkpoint(self.model).shape
        return int(shape.total_experts * kernel_form(BF16, "cpu", shape.expert).expert_bytes)


def subjects_of(args: argparse.Namespace) -> list[Subject]:
    """What is measured; the model with multi-token prediction is written if it is missing."""
    ngram = {"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    shape = QUICK_MTP_SHAPE if args.quick else MTP_SHAPE
    mtp = args.work_dir / "models" / ("glm4_moe-mtp-" + "-".join(map(str, shape.values())))
    if not (mtp / "config.json").exists():
        write_mtp_model(mtp, "glm4_moe", **shape)
    with_mtp: dict[str, Config] = {"none": None}
    for count in args.guesses:
        with_mtp[f"mtp {count}"] = {"method": "mtp", "num_speculative_tokens": count}
    texts = prompts(args.requests, seed=1)
    subjects = [Subject("mtp", mtp, with_mtp, texts, prompts(1, seed=1000)[0])]
    if not args.quick:
        others: dict[str, Config] = {
            "none": None,
            "ngram 3": ngram | {"num_speculative_tokens": 3},
        }
        for count in args.guesses:
            others[f"dense {count}"] = {
                "method": "draft_model",
                "model": str(args.dense),
                "num_speculative_tokens": count,
            }
        texts = questions()[: args.requests]
        subjects.append(Subject("upcycled", args.model, others, texts, questions()[-1]))
    return subjects


def serve(args: argparse.Namespace, subject: Subject, drafter: str, share: float) -> Case:
    """Figures of one server."""
    name = f"speculation-{subject.name}-{drafter.replace(' ', '')}-{share:g}"
    trace = args.work_dir / f"{name}.npz"
    cache_gb = share * subject.expert_bytes / GIB  # for the drafter's experts, too
    options = offload_options("trace", f"{cache_gb:.6f}", args.work_dir / "store")
    options += ["--moe-offload-config.record_trace", str(trace)]
    config = subject.drafters[drafter]
    if config is not None:
        options += ["--speculative-config", json.dumps(config)]
    with start_server(args, subject.model, name, options) as server:
        server.wait_healthy(START_SECONDS)
        take_turn(server, [subject.warm_up], args.tokens)  # not with an empty cache
        before = server.metrics()
        turn = take_turn(server, subject.texts, args.tokens)
        after = server.metrics()

    def change(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    replayed = replay_recorded(load_trace(trace), "trace")
    trace.unlink()
    return {
        "model": subject.name,
        "drafter": drafter,
        "share": share,
        "tokens_per_s": turn.decode_speed,
        "turn": turn.to_json(),
        "texts": turn.texts,
        "counters": {key: change(f"vllm:moe_offload_{key}_total") for key in COUNTERS},
        "speculation": {key: change(f"vllm:spec_decode_{key}_total") for key in SPECULATION},
        "replayed_hit_rate": replayed.hit_rate,
    }


def summary_of(cases: Sequence[Case]) -> list[Case]:
    """A row per model, share and drafter."""
    rows = []
    for key in dict.fromkeys((c["model"], c["share"], c["drafter"]) for c in cases):
        own = [c for c in cases if (c["model"], c["share"], c["drafter"]) == key]
        alone = [
            c for c in cases if (c["model"], c["share"], c["drafter"]) == (*key[:2], "none")
        ]
        count = {name: sum(c["counters"][name] for c in own) for name in COUNTERS}
        guesses = {name: sum(c["speculation"][name] for c in own) for name in SPECULATION}
        tokens = sum(c["turn"]["tokens"] for c in own)
        hits = count["hits"] - count["draft_hits"]
        misses = count["misses"] - count["draft_misses"]
        drafted = count["draft_hits"] + count["draft_misses"]
        rows.append(
            {
                "model": key[0],
                "share": key[1],
                "drafter": key[2],
                "tokens_per_s": spread([c["tokens_per_s"] for c in own]),
                "accepted_per_draft": guesses["num_accepted_tokens"] / guesses["num_drafts"]
                if guesses["num_drafts"]
                else 0.0,
                "accepted_share": guesses["num_accepted_tokens"] / guesses["num_draft_tokens"]
                if guesses["num_draft_tokens"]
                else 0.0,
                "misses_per_token": count["misses"] / tokens,
                "read_mb_per_token": count["read_bytes"] / tokens / 1e6,
                "model_misses_per_token": misses / tokens,
                "hit_rate": hits / max(hits + misses, 1),
                "draft_hit_rate": count["draft_hits"] / drafted if drafted else None,
                "replayed_hit_rate": spread([c["replayed_hit_rate"] for c in own])["median"],
                "same_texts": all(
                    mine == theirs
                    for c in own
                    for mine, theirs in zip(c["texts"], alone[0]["texts"], strict=True)
                ),
            }
        )
    return rows


def show(rows: Sequence[Case]) -> None:
    """The table."""
    table = Table(title="Greedy decoding, one request at a time (medians)")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("model", "drafter") else "right")
    for row in rows:
        (alone,) = (
            other["tokens_per_s"]["median"]
            for other in rows
            if (other["model"], other["share"], other["drafter"])
            == (row["model"], row["share"], "none")
        )
        table.add_row(
            row["model"],
            f"{row['share']:.0%}",
            row["drafter"],
            f"{row['tokens_per_s']['median']:.1f}",
            f"{row['tokens_per_s']['median'] / alone:.2f}",
            f"{row['accepted_per_draft']:.2f}",
            f"{row['misses_per_token']:.2f}",
            f"{row['hit_rate']:.1%}",
        )
    console.print(table)


def main() -> int:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    add_server_options(parser)
    parser.add_argument("--model", type=Path, help="default: models/upcycled in --work-dir")
    parser.add_argument("--dense", type=Path, help="default: models/dense in --work-dir")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument("--guesses", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--requests", type=int, default=6, help="per server")
    parser.add_argument("--tokens", type=int, default=64, help="generated per request")
    args = parser.parse_args()
    end_on_sigterm()
    args.model = args.model or args.work_dir / "models" / "upcycled"
    args.dense = args.dense or args.work_dir / "models" / "dense"
    if args.quick:
        args.eager, args.rounds, args.requests, args.tokens = True, 1, 1, 16
        args.shares, args.guesses = [0.5], [1]
    elif not all((path / "config.json").exists() for path in (args.model, args.dense)):
        parser.error(
            f"{args.model}, {args.dense}: no checkpoints; python -m scripts.upcycle makes them"
        )
    cases: list[Case] = []
    for subject in subjects_of(args):
        arms = [(drafter, share) for share in args.shares for drafter in subject.drafters]
        for order in orders([str(number) for number in range(len(arms))], args.rounds):
            for number in order:
                drafter, share = arms[int(number)]
                console.print(subject.name, f"{share:.0%}", drafter)
                cases.append(serve(args, subject, drafter, share))
    rows = summary_of(cases)
    show(rows)
    for case in cases:
        del case["texts"]
    report_of(
        args,
        "speculation",
        {
            "parameters": vars(args)
            | {
                "environment": ENVIRONMENT,
                "mtp_shape": QUICK_MTP_SHAPE if args.quick else MTP_SHAPE,
            },
            "summary": rows,
            "cases": cases,
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
