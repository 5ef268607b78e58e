"""Decode speed by the share of experts cached, beside llama.cpp's figures.

    python scripts/bench_llamacpp_shape.py [--quick]

One server per share and mode, one HTTP request at a time.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.harness.completions import Turn, prompts, take_turn  # noqa: E402
from scripts.harness.models import ensure_model, shape_of  # noqa: E402
from scripts.harness.options import (  # noqa: E402
    add_server_options,
    end_on_sigterm,
    parser_of,
)
from scripts.harness.pairing import spread  # noqa: E402
from scripts.harness.report import Bar, report_of  # noqa: E402
from scripts.harness.server import Server  # noqa: E402
from scripts.harness.serving import (  # noqa: E402
    ENVIRONMENT,
    START_SECONDS,
    offload_counters,
    offload_options,
    start_server,
)

LLAMACPP = {1.0: 51.0, 0.55: 2.3, 0.36: 0.86}
"""Tokens/s of llama.cpp (mmap) by the share of weights in memory. Measured by others, on 2
cores with 2.4 GB of bf16 weights of this shape; not measured here."""
COLUMNS = (
    "cached",
    "mode",
    "tokens/s",
    "hit rate",
    "MB/token",
    "stall",
    "llama.cpp",
    "ratio",
)

Case = dict[str, Any]

console = Console()


def serve_share(args: argparse.Namespace, model: Path, share: float, mode: str) -> Case:
    """Figures of one server."""
    options = offload_options(mode, f"{100 * share:g}%", args.work_dir / "store")
    with start_server(args, model, f"share-{mode}-{100 * share:.0f}", options) as server:
        healthy = server.wait_healthy(START_SECONDS)
        # A cold cache is not what is compared; nor is one that saw the very same requests.
        sampled_turn(server, args, args.repeats)
        before = offload_counters(server)
        turns = [sampled_turn(server, args, number) for number in range(args.repeats)]
        after = offload_counters(server)
    change = {name: after[name] - before[name] for name in after}
    return {
        "share": share,
        "mode": mode,
        "healthy_s": healthy,
        "plan": [line for line in server.log.splitlines() if "MoE offload: cache" in line],
        "tokens_per_s": spread([turn.decode_speed for turn in turns]),
        "client_tokens_per_s": spread([turn.client_speed for turn in turns]),
        "samples": [turn.to_json() for turn in turns],
        "counters": change,
        "hit_rate": change["hits"] / max(change["hits"] + change["misses"], 1),
        "read_mb_per_token": change["read_bytes"] / sum(t.tokens for t in turns) / 1e6,
        "stall_share": change["stall_seconds"] / sum(turn.seconds for turn in turns),
        "texts": turns[0].texts,
    }


def sampled_turn(server: Server, args: argparse.Namespace, number: int) -> Turn:
    """Other prompts for every ``number``.

    Sampled, by default: greedily, the demo model repeats a few words over and over, and a
    cache hits more than it would on text.
    """
    texts = prompts(args.requests, seed=number)
    return take_turn(server, texts, args.tokens, args.temperature)


def show(cases: Sequence[Case], *, compare: bool) -> None:
    """The table; ``compare``: whether the shape is that of llama.cpp's figures."""
    table = Table(
        title="Decode tokens/s, one request at a time (median of repeats)",
        caption="llama.cpp: measured by others on 2 cores, mmap, the same share of weights in "
        "memory; not measured here",
    )
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "mode" else "right")
    for case in cases:
        other = LLAMACPP.get(case["share"]) if compare else None
        table.add_row(
            f"{case['share']:.0%}",
            case["mode"],
            f"{case['tokens_per_s']['median']:.2f}",
            f"{case['hit_rate']:.1%}",
            f"{case['read_mb_per_token']:.1f}",
            f"{case['stall_share']:.0%}",
            "-" if other is None else f"{other:g}",
            "-" if other is None else f"{case['tokens_per_s']['median'] / other:.2f}",
        )
    console.print(table)


def bars_of(cases: Sequence[Case]) -> list[Bar]:
    """``trace`` at the least share against llama.cpp, where that was measured."""
    least = min(case["share"] for case in cases)
    return [
        Bar(
            f"tokens/s at {least:.0%} cached, trace / llama.cpp (others' measurement)",
            case["tokens_per_s"]["median"] / LLAMACPP[least],
            5.0,
        )
        for case in cases
        if case["mode"] == "trace" and case["share"] == least and least in LLAMACPP
    ]


def main() -> int:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    add_server_options(parser)
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.55, 0.36])
    parser.add_argument("--modes", nargs="+", default=["trace", "lrfu", "lru"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--requests", type=int, default=4, help="per repeat")
    parser.add_argument("--tokens", type=int, default=64, help="generated per request")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: greedy")
    args = parser.parse_args()
    end_on_sigterm()
    if args.quick:
        args.eager, args.repeats, args.requests, args.tokens = True, 1, 1, 16
        args.shares, args.modes = [0.36], ["trace"]
    model = ensure_model(args.work_dir, shape_of(args))
    cases = []
    for share, mode in itertools.product(args.shares, args.modes):
        console.print(f"{mode}, {share:.0%} of the experts cached")
        cases.append(serve_share(args, model, share, mode))
    show(cases, compare=not args.quick)
    report_of(
        args,
        "llamacpp_shape",
        {
            "parameters": vars(args) | {"shape": shape_of(args), "environment": ENVIRONMENT},
            "llamacpp_tokens_per_s": {
                "by_share": {str(share): speed for share, speed in LLAMACPP.items()},
                "source": "measured by others on 2 cores; not measured here",
            },
            "cases": cases,
        },
        [] if args.quick else bars_of(cases),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
