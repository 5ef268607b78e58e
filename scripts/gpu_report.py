"""The JSON report of the GPU suite: parts merged into one file, bounds, ratios and bars.

    python scripts/gpu_report.py [--results DIR]                show what was measured
    python scripts/gpu_report.py record PART --status N ...     note how a part of the suite ended

Parts come from separate runs, perhaps on separate machines, so each carries its hardware,
versions and commit, and only contestants of the same run of the same part are compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.gpu_bars import bars_of  # noqa: E402
from scripts.gpu_figures import summary_rows  # noqa: E402
from scripts.harness.machine import commit, hardware, versions  # noqa: E402
from scripts.harness.options import RESULTS  # noqa: E402
from scripts.harness.report import bars_table, write_report  # noqa: E402

NAME = "gpu"
TAIL_CHARACTERS = 6000


def load(results: Path) -> dict[str, Any]:
    """The report so far: of ``results``, else the committed one, else an empty one."""
    for directory in (results, RESULTS):
        path = directory / f"{NAME}.json"
        if path.exists():
            report = json.loads(path.read_text())
            return {"steps": report["steps"], "parts": report["parts"]}
    return {"steps": {}, "parts": {}}


def merge(report: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """``report`` with the steps and parts of ``new``, which replace older ones whole.

    A part is never mixed from two runs: its figures are compared with each other.
    """
    return {key: {**report.get(key, {}), **new.get(key, {})} for key in ("steps", "parts")}


def save(
    new: Mapping[str, Any], *, results: Path, work_dir: Path, quiet: bool = False
) -> dict[str, Any]:
    """Merges ``new`` into the report on disk, with summary and bars made anew.

    ``quiet``: without printing the bars.
    """
    report = merge(load(results), new)
    rows = [row for part in report["parts"].values() for row in summary_rows(part)]
    write_report(
        NAME,
        {**report, "summary": rows},
        bars=bars_of(report),
        work_dir=work_dir,
        results=results,
        quiet=quiet,
    )
    return report


def where_and_what(work_dir: Path) -> dict[str, Any]:
    """What every part carries: when, on what, from which commit it was measured."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "hardware": hardware(work_dir),
        "versions": versions(),
        "git": commit(),
    }


def show(report: Mapping[str, Any]) -> None:
    """Tables of what was measured, and what was not and why."""
    console = Console()
    for part in report["parts"].values():
        title = f"{part['name']} ({part['device']}), {part['date']}: medians"
        table = Table(title=title, title_justify="left")
        for column in (
            "contestant",
            "workload",
            "ms",
            "of resident",
            "of bound",
            "of serial",
            "hits",
            "same",
        ):
            left = column in ("contestant", "workload")
            table.add_column(column, justify="left" if left else "right")
        for row in summary_rows(part):
            seconds = row.get("step_s", row.get("prefill_s"))
            same, total = row["same_tokens_as_resident"]
            table.add_row(
                row["contestant"],
                row["workload"],
                "-" if seconds is None else f"{1e3 * seconds:.2f}",
                *(
                    "-" if row[key] is None else f"{row[key]:.3f}"
                    for key in ("of_resident", "of_bound", "of_serial", "hit_rate")
                ),
                f"{same}/{total}",
            )
        console.print(table)
        for name, contestant in part["contestants"].items():
            if contestant["status"] != "measured":
                console.print(f"{name}: {contestant['status']}: {contestant['reason']}")
            for workload, repeats in contestant.get("short", {}).items():
                console.print(f"{name}: {workload}: time was over after {repeats} repeats")
            for workload, samples in contestant.get("workloads", {}).items():
                compiled = sum(bool(sample.get("compiled")) for sample in samples)
                if compiled:
                    console.print(
                        f"{name}: {workload}: kernels were compiled in {compiled} of "
                        f"{len(samples)} repeats that count"
                    )


def main() -> int:
    """Exit status 0; ``record`` never judges what it notes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    commands = parser.add_subparsers(dest="command")
    record = commands.add_parser("record", help="note how a part of the suite ended")
    record.add_argument("step", help="a part of scripts/gpu_suite.sh")
    record.add_argument("--status", type=int, required=True, help="exit status of the step")
    record.add_argument("--seconds", type=float, required=True)
    record.add_argument("--log", type=Path, required=True, help="its end goes into the report")
    args = parser.parse_args()
    if args.command is None:
        report = load(args.results)
        show(report)
        Console().print(bars_table([(NAME, bar.to_json()) for bar in bars_of(report)]))
        return 0
    step = {
        "status": args.status,
        "seconds": args.seconds,
        "log_tail": args.log.read_text(errors="replace")[-TAIL_CHARACTERS:],
        **where_and_what(ROOT),
    }
    save({"steps": {args.step: step}}, results=args.results, work_dir=ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
