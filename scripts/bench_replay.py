"""Hit rates of all policies on a routing trace, and what each part of ``trace`` brings.

    python scripts/bench_replay.py TRACE.npz [--quick] [--only QUESTION]

Table: every policy in every cell of capacity and concurrency (the first 100 requests at
concurrency 1 and 4, all of them above). Ablation: ``trace`` with one part removed at a time, on
the trace, on those of the real model (``--real``), on cold requests, and on made-up workloads;
together: the same with several parts removed at once.
Synthetic: models of other shapes and workloads of other structure, short traces, where
``trace`` must not lose either. Shift: hit rates before, at and after a change of workload.
Prefill: a request's decode hit rates before and after a neighbour's long prefill.
Device: one pool of slots by the rule of a cache that the device plans, beside ``lrfu`` with as many
slots and free staging, and with staging in the same memory.
The seconds are CPU time of one thread (run with OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.harness.options import parser_of, results_of  # noqa: E402
from scripts.harness.report import Bar, write_report  # noqa: E402
from scripts.replay_questions import (  # noqa: E402
    ablation,
    device,
    prefill,
    shift,
    synthetic,
    table,
)
from scripts.replay_questions.cells import Row  # noqa: E402
from scripts.replay_questions.parts import COMPLETE, PARTS, TOGETHER  # noqa: E402
from vllm_moe_offload.trace.routing import RoutingTrace, load_trace  # noqa: E402

Part = tuple[list[Row], list[Bar]]
Question = Callable[[RoutingTrace, argparse.Namespace], Part | None]


def _synthetic(trace: RoutingTrace, args: argparse.Namespace) -> Part:
    rows = synthetic.synthetic(1 if args.quick else args.seeds)
    return rows, synthetic.bars_of(rows)


def _shift(trace: RoutingTrace, args: argparse.Namespace) -> Part:
    rows = shift.shift(1 if args.quick else args.seeds)
    return rows, shift.bars_of(rows)


def _prefill(trace: RoutingTrace, args: argparse.Namespace) -> Part:
    rows = prefill.prefill(trace, 4 if args.quick else 40)
    return rows, prefill.bars_of(rows)


def _device(trace: RoutingTrace, args: argparse.Namespace) -> Part:
    rows = device.device(device.workloads(Path(args.trace), trace, args.real, args.quick))
    return rows, device.bars_of(rows)


def _without(name: str, removals: Sequence[str]) -> Question:
    """The ablation of some parts, which writes its report as it goes."""

    def ask(trace: RoutingTrace, args: argparse.Namespace) -> None:
        traces = [load_trace(path) for path in args.real]
        names = [path.name for path in (Path(args.trace), *args.real)]

        def save(rows: list[Row], summary: list[Row]) -> None:
            data = {"parameters": {"traces": names}, "samples": rows, "summary": summary}
            write_report(name, data, results=results_of(args), quiet=True)

        chosen = itertools.islice(ablation.cells(trace, traces), 2 if args.quick else None)
        ablation.ablation(chosen, removals[:3] if args.quick else removals, save)

    return ask


def _table(trace: RoutingTrace, args: argparse.Namespace) -> Part:
    rows = table.table(trace, args.quick)
    return rows, [] if args.quick else table.bars_of(rows)


QUESTIONS: dict[str, Question] = {
    "synthetic": _synthetic,
    "shift": _shift,
    "prefill": _prefill,
    "device": _device,
    "ablation": _without("replay_ablation", list(PARTS)),
    "together": _without("replay_together", [COMPLETE, *TOGETHER]),
    "table": _table,
}
"""In the order in which they run: the longest one last. None: it wrote its report itself."""


def main() -> int:
    """Runs the parts asked for; exit status 1 if a bar is missed."""
    parser = parser_of(__doc__)
    parser.add_argument("trace", help="routing trace; the bars are those of gpt-oss-20b's")
    parser.add_argument("--only", choices=list(QUESTIONS))
    parser.add_argument("--seeds", type=int, default=3, help="of every synthetic trace")
    parser.add_argument(
        "--real",
        type=Path,
        nargs="*",
        default=sorted((ROOT / "benchmarks" / "traces").glob("*.npz")),
        help="traces of scripts/record_routing.py, for ablation and device (default: the project's)",
    )
    args = parser.parse_args()
    trace = load_trace(args.trace)
    met = True
    for name, run in QUESTIONS.items():
        if args.only not in (None, name):
            continue
        answer = run(trace, args)
        if answer is None:
            continue
        rows, bars = answer
        parameters = {"trace": Path(args.trace).name, "requests": trace.num_requests}
        write_report(
            f"replay_{name}",
            {"parameters": parameters, "samples": rows},
            bars=bars,
            results=results_of(args),
        )
        met = met and all(bar.met for bar in bars)
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
