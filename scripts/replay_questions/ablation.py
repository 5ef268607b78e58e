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
from statistics import mean
from typing import Any

from scripts.replay_questions.cells import PLAIN, Row, log
from scripts.replay_questions.parts import COMPLETE, REMOVALS
from scripts.replay_questions.workloads import Cell, gpt_oss, real, restarts, shift, synthetic
from scripts.replay_questions.young import YOUNG_TOKENS
from vllm_moe_offload.trace.routing import RoutingTrace

ALL, FIRST = "all tokens", f"first {YOUNG_TOKENS} tokens"
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
        parts: keys of ``parts.REMOVALS``; the first is :data:`COMPLETE`.
        save: is given all rows so far and their summary after every cell.
    """
    rows: list[Row] = []
    for cell in chosen:
        began = time.process_time()
        plain = [cell.rates(policy) for policy in PLAIN]
        best, best_young = (max(rates) for rates in zip(*plain, strict=True))
        for part in parts:
            with REMOVALS[part]():
                rate, young = cell.rates("trace")
            row = {"workload": cell.workload, "cell": cell.name, "part": part}
            rows.append(row | {"tokens": ALL, "hit_rate": rate, "margin": rate - best})
            if cell.has_young:
                figures = {"hit_rate": young, "margin": young - best_young}
                rows.append(row | {"tokens": FIRST} | figures)
        seconds = time.process_time() - began
        log(f"ablation: {cell.workload}, {cell.name} in {seconds:.0f} s of CPU")
        save(rows, summary(rows))


def summary(rows: Sequence[Row]) -> list[Row]:
    """Per workload and part: worst and mean margin, and how removing the part changes them.

    A part ``matters`` where it changes the worst margin by :data:`MATTERS` or more, for better
    or for worse.
    """
    found = []
    for tokens, workload in dict.fromkeys((row["tokens"], row["workload"]) for row in rows):
        mine = [row for row in rows if (row["tokens"], row["workload"]) == (tokens, workload)]
        whole = [row["margin"] for row in mine if row["part"] == COMPLETE]
        for part in dict.fromkeys(row["part"] for row in mine):
            margins = [row["margin"] for row in mine if row["part"] == part]
            worst_change = min(margins) - min(whole)
            found.append(
                {
                    "tokens": tokens,
                    "workload": workload,
                    "part": part,
                    "cells": len(margins),
                    "worst_margin": min(margins),
                    "mean_margin": mean(margins),
                    "worst_change": worst_change,
                    "mean_change": mean(margins) - mean(whole),
                    "matters": abs(worst_change) >= MATTERS,
                }
            )
    return found


def markdown(summarised: Sequence[dict[str, Any]]) -> str:
    """The tables of ``docs/policies.md``: one of all tokens, one of requests' first ones."""
    return "\n\n".join(_table(summarised, tokens) for tokens in (ALL, FIRST))


def _table(summarised: Sequence[dict[str, Any]], tokens: str) -> str:
    """Change of the worst margin per workload, and of the mean over all cells."""
    mine = [row for row in summarised if row["tokens"] == tokens]
    workloads = list(dict.fromkeys(row["workload"] for row in mine))
    lines = [
        f"| {tokens} | " + " | ".join(workloads) + " | mean | worth it |",
        "|---" * (len(workloads) + 3) + "|",
    ]
    for part in dict.fromkeys(row["part"] for row in mine):
        found = [row for row in mine if row["part"] == part]
        everywhere = [row for row in summarised if row["part"] == part]
        cells = sum(row["cells"] for row in found)
        is_whole = part == COMPLETE
        kind = "margin" if is_whole else "change"
        average = sum(row[f"mean_{kind}"] * row["cells"] for row in found) / cells
        figures = [_figure(row[f"worst_{kind}"], row["matters"]) for row in found]
        title = "worst margin, complete" if is_whole else f"without {part}"
        verdict = "" if is_whole else _verdict(everywhere)
        lines.append(f"| {title} | {' | '.join(figures)} | {_figure(average)} | {verdict} |")
    return "\n".join(lines)


def _figure(value: float, matters: bool = False) -> str:
    figure = f"{value:+.4f}".replace("0.", ".")
    return f"**{figure}**" if matters else figure


def _verdict(found: Sequence[dict[str, Any]]) -> str:
    """Whether a part is worth it on any workload; ``costs``: one does better without it."""
    lost = any(row["worst_change"] < 0 for row in found if row["matters"])
    gained = any(row["worst_change"] > 0 for row in found if row["matters"])
    return ("yes, costs" if gained else "yes") if lost else ("costs" if gained else "no")


def main() -> int:
    """Prints the table of a report."""
    report = json.loads(Path(sys.argv[1]).read_text())
    print(markdown(report["summary"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
