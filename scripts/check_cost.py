"""What it costs a server to check records, for bench_reads.py.

Three engines, each in a process of its own (reads_contestant.py), with the same model, store and
prompts: one that checks no record (which no option gives), one that checks each when it is first
read, one that checks each at every read. They start with an empty cache. In every round each engine
answers a prompt of each topic, one after the other, while the other engines sleep; who begins
changes with every repeat, and every repeat has new processes. The first round has nearly all
records read once; what comes after it is the steady state.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from scripts.demo_model import TOPICS
from scripts.harness import serving
from scripts.harness.engine import EngineProcess
from scripts.harness.models import ensure_model, shape_of
from scripts.harness.options import ROOT, log_path
from scripts.harness.pairing import orders, spread

CONTESTANT = ROOT / "scripts" / "reads_contestant.py"
ARMS: dict[str, dict[str, bool]] = {
    "never": {"checks": False, "verify": False},
    "first read": {"checks": True, "verify": False},
    "every read": {"checks": True, "verify": True},
}
ENVIRONMENT = serving.ENVIRONMENT | {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # The same tokens have the same hash in all processes.
    "PYTHONHASHSEED": "0",
}

Sample = dict[str, Any]
"""A repeat: by arm, the figures of its rounds, in their order."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """How much is served."""
    parser.add_argument("--serving-repeats", type=int, default=5, help="starts of each server")
    parser.add_argument("--rounds", type=int, default=4, help="of prompts; the first one apart")
    parser.add_argument("--tokens", type=int, default=16, help="generated per prompt")
    parser.add_argument("--share", type=float, default=0.25, help="of the experts, cached")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All repeats, and what they say."""
    model = ensure_model(args.work_dir, shape_of(args))
    with engines(args, model):
        pass  # builds the store, and what is compiled is kept
    samples = []
    for number, order in enumerate(orders(list(ARMS), args.serving_repeats)):
        samples.append(repeat(args, model, order))
        print(f"serving, repeat {number + 1}: {_in_words(samples[-1])}", file=sys.stderr)
    return {
        "shape": shape_of(args),
        "environment": ENVIRONMENT,
        "summary": summary(samples),
        "samples": samples,
    }


@contextlib.contextmanager
def engines(args: argparse.Namespace, model: Path) -> Iterator[dict[str, EngineProcess]]:
    """All contestants by name, with empty caches."""
    with contextlib.ExitStack() as stack:
        ready: dict[str, EngineProcess] = {}
        for name, arm in ARMS.items():
            log = log_path(args, f"reads-{name.replace(' ', '-')}")
            trace = log.with_name(f"reads-{os.getpid()}-{len(ready)}.msgpack")
            stack.callback(trace.unlink, missing_ok=True)
            arguments = {
                "name": name,
                "records": False,
                "model": str(model),
                "directory": str(log.parent),
                "concurrency": 1,
                "requests": len(TOPICS),
                "tokens": args.tokens,
                "checks": arm["checks"],
                "options": {
                    "mode": "trace",
                    "cache_gb": f"{100 * args.share:g}%",
                    "store_dir": str(args.work_dir / "store"),
                    "trace_path": str(trace),
                    "verify": arm["verify"],
                },
            }
            ready[name] = EngineProcess(
                name, CONTESTANT, arguments, log=log, environment=ENVIRONMENT
            )
            stack.callback(ready[name].close)
        yield ready


def repeat(args: argparse.Namespace, model: Path, order: Sequence[str]) -> Sample:
    """All prompts, by engines that have served nothing yet."""
    rounds: Sample = {name: [] for name in ARMS}
    with engines(args, model) as ready:
        for number in range(args.rounds):
            for name in order:
                rounds[name].append(ready[name].ask(str(number)))
        records = next(iter(ready.values())).ready["records"]
    return {"order": list(order), "records": records, "rounds": rounds}


def figures_of(sample: Sample, name: str) -> dict[str, float]:
    """One arm's figures of a repeat."""
    first, *later = sample["rounds"][name]
    steady = {key: sum(one[key] for one in later) for key in first}
    return {
        "first_round_s": first["seconds"],
        "first_round_stall_s": first["stall_s"],
        "records_read_share": first["records_read"] / sample["records"],
        "tokens_per_s": steady["generated"] / steady["seconds"],
        "stall_ms_per_token": 1e3 * steady["stall_s"] / steady["tokens"],
        "hit_rate": steady["hits"] / (steady["hits"] + steady["misses"]),
    }


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """Per arm the spread of each figure and, paired by repeat, how it differs from ``never``."""
    found: dict[str, Any] = {}
    by_arm = {name: [figures_of(sample, name) for sample in samples] for name in ARMS}
    for name, figures in by_arm.items():
        pairs = list(zip(figures, by_arm["never"], strict=True))
        more = {
            f"{key}_more": [mine[key] - others[key] for mine, others in pairs]
            for key in ("first_round_s", "first_round_stall_s")
        }
        speeds = [mine["tokens_per_s"] / others["tokens_per_s"] for mine, others in pairs]
        values = {key: [one[key] for one in figures] for key in figures[0]}
        values |= more | {"tokens_per_s_ratio": speeds}
        found[name] = {key: spread(samples_of) for key, samples_of in values.items()}
    return {"arms": found, "same_tokens": all(map(same_tokens, samples))}


def same_tokens(sample: Sample) -> bool:
    """Whether all arms generated the same in every round."""
    hashes = [[one["token_hash"] for one in rounds] for rounds in sample["rounds"].values()]
    return all(row == hashes[0] for row in hashes)


def _in_words(sample: Sample) -> str:
    figures = {name: figures_of(sample, name) for name in ARMS}
    return ", ".join(
        f"{name}: {one['first_round_s']:.2f} s, then {one['tokens_per_s']:.1f} tokens/s"
        for name, one in figures.items()
    )


def table_of(found: dict[str, Any]) -> Table:
    """A row per arm."""
    table = Table(title="Serving from an empty cache, by when records are checked (medians)")
    columns = ("checked", "first round s", "stalled s", "more", "tokens/s", "of never", "hits")
    for column in columns:
        table.add_column(column, justify="left" if column == "checked" else "right")
    for name, arm in found["summary"]["arms"].items():
        middle = {key: figure["median"] for key, figure in arm.items()}
        table.add_row(
            name,
            f"{middle['first_round_s']:.2f}",
            f"{middle['first_round_stall_s']:.2f}",
            f"{middle['first_round_stall_s_more']:+.2f}",
            f"{middle['tokens_per_s']:.1f}",
            f"{middle['tokens_per_s_ratio']:.3f}",
            f"{middle['hit_rate']:.1%}",
        )
    return table
