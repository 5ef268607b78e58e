"""The same model in bf16 and in int4, with the same bytes for its experts.

    python -m scripts.upcycle --out build/bench/models/upcycled
    python scripts/bench_formats.py [--quick]

The upcycled SmolLM2 (scripts/upcycle), whose routing is that of a language model, and a quantised
copy of it (scripts/quantize). Shares are of the bf16 experts' bytes, for both: what a budget of
memory buys. One server per format and share, one HTTP request at a time; formats take turns.
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

from scripts.harness.completions import Turn, questions, take_turn  # noqa: E402
from scripts.harness.machine import cpu_flags  # noqa: E402
from scripts.harness.models import GROUP_SIZE, ensure_quantised  # noqa: E402
from scripts.harness.options import (  # noqa: E402
    add_server_options,
    end_on_sigterm,
    parser_of,
)
from scripts.harness.pairing import orders, spread  # noqa: E402
from scripts.harness.report import Bar, report_of  # noqa: E402
from scripts.harness.serving import (  # noqa: E402
    ENVIRONMENT,
    START_SECONDS,
    kernel_options,
    offload_counters,
    offload_options,
    start_server,
)
from vllm_moe_offload.config import GIB  # noqa: E402
from vllm_moe_offload.plan.shapes.checkpoint import read_checkpoint  # noqa: E402
from vllm_moe_offload.plan.shapes.kernel_form import BF16, kernel_form  # noqa: E402

COLUMNS = ("format", "budget", "experts cached", "tokens/s", "hits", "MB/token", "stall")

Case = dict[str, Any]

console = Console()


def models_of(args: argparse.Namespace) -> dict[str, Path]:
    """The model in each format; the quantised ones are written if they are missing."""
    return {
        "bf16": args.model,
        **{name: ensure_quantised(args.model, name) for name in args.formats},
    }


def serve(
    args: argparse.Namespace, model: Path, name: str, share: float, budget: int
) -> list[Case]:
    """Figures of one server, a case per repeat."""
    options = offload_options("trace", f"{budget / GIB:.6f}", args.work_dir / "store")
    if name != "bf16":
        options += kernel_options(cpu_flags())
    with start_server(args, model, f"formats-{name}-{100 * share:.0f}", options) as server:
        server.wait_healthy(START_SECONDS)
        ask(server, args, args.repeats)  # neither a cold cache nor one that saw the same
        cases = []
        for number in range(args.repeats):
            before = offload_counters(server)
            turn = ask(server, args, number)
            after = offload_counters(server)
            change = {key: after[key] - before[key] for key in after}
            metrics = server.metrics()
            cases.append(
                {
                    "format": name,
                    "share": share,
                    "budget_bytes": budget,
                    "slots": metrics["vllm:moe_offload_slots"],
                    "tokens_per_s": turn.decode_speed,
                    "turn": turn.to_json(),
                    "counters": change,
                }
            )
        return cases


def ask(server: Any, args: argparse.Namespace, number: int) -> Turn:
    """Other questions for every ``number``, in turn; sampled at temperature 1."""
    texts = questions(args.requests, number)
    return take_turn(server, texts, args.tokens, args.temperature)


def summary_of(cases: Sequence[Case], total: int) -> list[Case]:
    """A row per format and share; ``total``: experts of the model."""
    rows = []
    for name, share in dict.fromkeys((case["format"], case["share"]) for case in cases):
        own = [case for case in cases if (case["format"], case["share"]) == (name, share)]
        change = {key: sum(c["counters"][key] for c in own) for key in own[0]["counters"]}
        tokens = sum(case["turn"]["tokens"] for case in own)
        rows.append(
            {
                "format": name,
                "share": share,
                "cached": own[0]["slots"] / total,
                "tokens_per_s": spread([case["tokens_per_s"] for case in own]),
                "hit_rate": change["hits"] / max(change["hits"] + change["misses"], 1),
                "read_mb_per_token": change["read_bytes"] / tokens / 1e6,
                "stall_share": change["stall_seconds"]
                / sum(sum(case["turn"]["request_s"]) for case in own),
            }
        )
    return rows


def show(rows: Sequence[Case]) -> None:
    """The table."""
    table = Table(title="Decode tokens/s with the same bytes for experts (median of repeats)")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "format" else "right")
    for row in rows:
        table.add_row(
            row["format"],
            f"{row['share']:.0%} of bf16",
            f"{row['cached']:.0%}",
            f"{row['tokens_per_s']['median']:.1f}",
            f"{row['hit_rate']:.1%}",
            f"{row['read_mb_per_token']:.1f}",
            f"{row['stall_share']:.0%}",
        )
    console.print(table)


def bars_of(rows: Sequence[Case]) -> list[Bar]:
    """int4 against bf16 at the least share, and whether int4 fits at the largest."""
    by_case = {(row["format"], row["share"]): row for row in rows}
    shares = sorted({row["share"] for row in rows})
    if ("int4", shares[0]) not in by_case:
        return []
    speeds = [by_case[name, shares[0]]["tokens_per_s"]["median"] for name in ("int4", "bf16")]
    bars = [
        Bar(
            f"tokens/s with {shares[0]:.0%} of the bf16 bytes, int4 / bf16",
            speeds[0] / speeds[1],
            3.0,
            unit="x",
        )
    ]
    if len(shares) > 1:
        bars.append(
            Bar(
                f"int4 with {shares[-1]:.0%} of the bf16 bytes: share of experts cached",
                by_case["int4", shares[-1]]["cached"],
                1.0,
            )
        )
    return bars


def main() -> int:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    add_server_options(parser)
    parser.add_argument("--model", type=Path, help="default: models/upcycled in --work-dir")
    parser.add_argument("--formats", nargs="+", default=["int4"], help="beside bf16")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.30, 0.15])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=3, help="per repeat")
    parser.add_argument("--tokens", type=int, default=64, help="generated per request")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: greedy")
    args = parser.parse_args()
    end_on_sigterm()
    if args.quick:
        args.eager, args.rounds, args.repeats, args.requests, args.tokens = True, 1, 1, 1, 16
    args.model = args.model or args.work_dir / "models" / "upcycled"
    if not (args.model / "config.json").exists():
        parser.error(
            f"--model {args.model}: no checkpoint; python -m scripts.upcycle makes one"
        )
    models = models_of(args)
    shape = read_checkpoint(args.model).shape
    total = shape.total_experts
    expert_bytes = kernel_form(BF16, "cpu", shape.expert).expert_bytes
    bf16_bytes = total * expert_bytes
    cases: list[Case] = []
    for order in orders(list(models), args.rounds):
        for share in args.shares:
            for name in order:
                console.print(f"{name}, {share:.0%} of the bf16 bytes")
                cases += serve(args, models[name], name, share, int(share * bf16_bytes))
    rows = summary_of(cases, total)
    show(rows)
    report_of(
        args,
        "formats",
        {
            "parameters": vars(args) | {"group_size": GROUP_SIZE, "environment": ENVIRONMENT},
            "experts": total,
            "bf16_expert_bytes": expert_bytes,
            "summary": rows,
            "cases": cases,
        },
        [] if args.quick else bars_of(rows),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
