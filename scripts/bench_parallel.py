"""Decode tokens/s of one worker and of two, each worker with the same bytes for experts.

    python scripts/bench_parallel.py [--quick]

Layouts take turns: one worker; two with a slice of every expert each (tensor parallel); two with half
of each layer's experts (expert parallel). A worker computes on one core, and all read from one
disk: what a second worker adds here is its core and its memory, not a disk.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.harness.completions import prompts, take_turn  # noqa: E402
from scripts.harness.models import ensure_model, shape_of  # noqa: E402
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
    offload_counters,
    offload_options,
    start_server,
)
from vllm_moe_offload.config import GIB  # noqa: E402
from vllm_moe_offload.plan.shapes.checkpoint import read_checkpoint  # noqa: E402
from vllm_moe_offload.plan.shapes.kernel_form import BF16, kernel_form  # noqa: E402

LAYOUTS: dict[str, tuple[list[str], str]] = {
    "one": ([], "0"),
    "tensor": (["--tensor-parallel-size", "2"], "0|1"),
    "expert": (["--tensor-parallel-size", "2", "--enable-expert-parallel"], "0|1"),
}
"""Options of each layout, and the cores of its workers."""
COLUMNS = ("layout", "cached", "tokens/s", "x one", "hits", "MB/token", "stall of a worker")

Case = dict[str, Any]

console = Console()


def serve(args: argparse.Namespace, model: Path, layout: str, cache_bytes: int) -> list[Case]:
    """Figures of one server, a case per repeat; counters are summed over workers."""
    options, cores = LAYOUTS[layout]
    extra = offload_options("trace", f"{cache_bytes / GIB:.6f}", args.work_dir / "store")
    with start_server(
        args,
        model,
        f"parallel-{layout}",
        [*extra, *options],
        environment={"VLLM_CPU_OMP_THREADS_BIND": cores},
    ) as server:
        server.wait_healthy(START_SECONDS)
        # Neither an empty cache nor one that saw the same texts.
        take_turn(server, prompts(args.requests, seed=1000), args.tokens, args.temperature)
        cases = []
        for number in range(args.repeats):
            before = offload_counters(server)
            texts = prompts(args.requests, seed=number)
            turn = take_turn(server, texts, args.tokens, args.temperature)
            after = offload_counters(server)
            cases.append(
                {
                    "layout": layout,
                    "workers": cores.count("|") + 1,
                    "slots": server.metrics()["vllm:moe_offload_slots"],
                    "tokens_per_s": turn.decode_speed,
                    "turn": turn.to_json(),
                    "counters": {key: after[key] - before[key] for key in after},
                }
            )
        return cases


def summary_of(cases: Sequence[Case], total: int) -> list[Case]:
    """A row per layout; ``total``: experts of the model."""
    rows = []
    for layout in dict.fromkeys(case["layout"] for case in cases):
        own = [case for case in cases if case["layout"] == layout]
        change = {key: sum(c["counters"][key] for c in own) for key in own[0]["counters"]}
        workers = own[0]["workers"]
        seconds = sum(sum(case["turn"]["request_s"]) for case in own)
        # With slices a slot is a part of an expert, and every worker counts every expert.
        parts = workers if layout == "tensor" else 1
        rows.append(
            {
                "layout": layout,
                "workers": workers,
                "cached": own[0]["slots"] / parts / total,
                "tokens_per_s": spread([case["tokens_per_s"] for case in own]),
                "hit_rate": change["hits"] / max(change["hits"] + change["misses"], 1),
                "read_mb_per_token": change["read_bytes"]
                / sum(case["turn"]["tokens"] for case in own)
                / 1e6,
                "stall_share": change["stall_seconds"] / workers / seconds,
            }
        )
    return rows


def show(rows: Sequence[Case]) -> None:
    """The table."""
    table = Table(title="Decode tokens/s, the same bytes of cache per worker (median)")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "layout" else "right")
    (alone,) = (row["tokens_per_s"]["median"] for row in rows if row["layout"] == "one")
    for row in rows:
        speed = row["tokens_per_s"]["median"]
        table.add_row(
            row["layout"],
            f"{row['cached']:.0%}",
            f"{speed:.1f}",
            f"{speed / alone:.2f}",
            f"{row['hit_rate']:.1%}",
            f"{row['read_mb_per_token']:.1f}",
            f"{row['stall_share']:.0%}",
        )
    console.print(table)


def main() -> int:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    add_server_options(parser)
    parser.add_argument("--share", type=float, default=0.25, help="of all experts, per worker")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=3, help="per repeat")
    parser.add_argument("--tokens", type=int, default=64, help="generated per request")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: greedy")
    args = parser.parse_args()
    end_on_sigterm()
    if args.quick:
        args.eager, args.rounds, args.repeats, args.requests, args.tokens = True, 1, 1, 1, 16
        args.share = 0.5  # a quarter would be less than a layer
    model = ensure_model(args.work_dir, shape_of(args))
    shape = read_checkpoint(model).shape
    expert_bytes = kernel_form(BF16, "cpu", shape.expert).expert_bytes
    cache_bytes = int(args.share * shape.total_experts * expert_bytes)
    cases: list[Case] = []
    for order in orders(list(LAYOUTS), args.rounds):
        for layout in order:
            console.print(layout)
            cases += serve(args, model, layout, cache_bytes)
    rows = summary_of(cases, shape.total_experts)
    show(rows)
    report_of(
        args,
        "parallel",
        {
            "parameters": vars(args) | {"environment": ENVIRONMENT, "layouts": LAYOUTS},
            "experts": shape.total_experts,
            "cache_bytes_per_worker": cache_bytes,
            "summary": rows,
            "cases": cases,
        },
        [],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
