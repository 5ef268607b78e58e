"""``trace`` without one part at a time, on every kind of workload.

    python -m scripts.replay_questions.ablation REPORT.json

prints the table of ``docs/policies.md`` from a report.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from scripts.replay_questions.cells import PLAIN, Row, log
from scripts.replay_questions.parts import COMPLETE, PARTS
from scripts.replay_questions.workloads import Cell, gpt_oss, real, restarts, shift, synthetic
from vllm_moe_offload.trace.routing import RoutingTrace

YOUNG = "first 16 tokens"
MATTERS = 0.002
"""Change of a workload's worst margin from which a part is worth its code."""

Save = Callable[[list[Row], list[Row]], object]


def cells(trace: RoutingTrace, traces: Sequence[RoutingTrace]) -> Iterable[Cell]:
    """All cells; ``traces``: of the real model, one per concurrency."""
    yield from real(traces)
    yield from gpt_oss(trace)
    yield from restarts(trace, traces)
    yield from synthetic()
    yield from shift()


def ablation(chosen: Iterable[Cell], parts: Sequence[str], save: Save) -> None:
    """Replays every cell by the plain policies, and by ``trace`` without each of ``parts``.

    Args:
        chosen: cells.
        parts: keys of ``parts.PARTS``; the first is :data:`COMPLETE`.
        save: is given all rows so far and their summary after every cell.
    """
    rows: list[Row] = []
    for cell in chosen:
        began = time.process_time()
        plain = [cell.rates(policy) for policy in PLAIN]
        best, best_young = (max(rates) for rates in zip(*plain, strict=True))
        for part in parts:
            with PARTS[part]():
                rate, young = cell.rates("trace")
            row = {"workload": cell.workload, "cell": cell.name, "part": part}
            rows.append({**row, "hit_rate": rate, "margin": rate - best})
            if cell.has_young:
                row |= {"workload": YOUNG, "cell": f"{cell.workload}, {cell.name}"}
                rows.append({**row, "hit_rate": young, "margin": young - best_young})
        seconds = time.process_time() - began
        log(f"ablation: {cell.workload}, {cell.name} in {seconds:.0f} s of CPU")
        save(rows, summary(rows))


def summary(rows: Sequence[Row]) -> list[Row]:
    """Per part and workload: worst and mean margin, and how removing the part changes them.

    ``steady_change`` is the mean change over all cells. A part ``matters`` where a change of
    the worst margin, in either direction, is :data:`MATTERS` or more.
    """
    found = []
    for workload in dict.fromkeys(row["workload"] for row in rows):
        mine = [row for row in rows if row["workload"] == workload]
        whole = [row["margin"] for row in mine if row["part"] == COMPLETE]
        for part in dict.fromkeys(row["part"] for row in mine):
            margins = [row["margin"] for row in mine if row["part"] == part]
            worst, mean = min(margins), sum(margins) / len(margins)
            worst_change = worst - min(whole)
            found.append(
                {
                    "workload": workload,
                    "part": part,
                    "cells": len(margins),
                    "worst_margin": worst,
                    "mean_margin": mean,
                    "worst_change": worst_change,
                    "mean_change": mean - sum(whole) / len(whole),
                    "matters": abs(worst_change) >= MATTERS,
                }
            )
    return found


def markdown(summarised: Sequence[dict[str, Any]]) -> str:
    """The table of ``docs/policies.md``: change of the worst and of the mean margin."""
    workloads = list(dict.fromkeys(row["workload"] for row in summarised))
    lines = [
        "| `trace` | " + " | ".join(workloads) + " | worth it |",
        "|---" * (len(workloads) + 2) + "|",
    ]
    for part in dict.fromkeys(row["part"] for row in summarised):
        found = {row["workload"]: row for row in summarised if row["part"] == part}
        if part == COMPLETE:
            figures = [_pair(found[w], "worst_margin", "mean_margin") for w in workloads]
            lines.append(f"| {part}: margin | " + " | ".join(figures) + " | |")
            continue
        figures = [_pair(found[w], "worst_change", "mean_change") for w in workloads]
        lines.append(f"| without {part} | " + " | ".join(figures) + f" | {_verdict(found)} |")
    return "\n".join(lines)


def _pair(row: dict[str, Any], worst: str, mean: str) -> str:
    mark = "**" if row["matters"] and worst == "worst_change" else ""
    return f"{mark}{row[worst]:+.4f}{mark} / {row[mean]:+.4f}"


def _verdict(found: dict[str, dict[str, Any]]) -> str:
    lost = [row["worst_change"] for row in found.values() if row["matters"]]
    if not lost:
        return "no"
    return "yes" if min(lost) < 0 else "no, it costs"


def main() -> int:
    """Prints the table of a report."""
    report = json.loads(Path(sys.argv[1]).read_text())
    print(markdown(report["summary"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
