"""What the GPU benchmark has to reach, from the report of scripts/gpu_report.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.gpu_figures import (  # noqa: E402
    contestants_of,
    median_of,
    same_tokens,
    summary_rows,
)
from scripts.gpu_plan import SWEEP_SHARES  # noqa: E402
from scripts.harness.report import Bar  # noqa: E402

STEPS = (
    "build",
    "tests",
    *(f"identity-{number}" for number in range(1, 6)),
    "smoke",
)
"""Parts of the suite that are no benchmarks."""

OF_SERIAL = 0.93
OF_RESIDENT = 0.9
AGAINST_UVA = 4.0
FITS = 0.99
OF_STREAM = 0.75
PROMPT = "prefill-4096"
SWEPT = tuple(f"decode-{batch}-any-topic" for batch in (1, 8))
DECODE_BATCHES = (1, 8, 32)
MAIN_SHARE = 25
"""Per cent of the experts on the device, where one share has to do."""


def bars_of(report: Mapping[str, Any]) -> list[Bar]:
    """The bars of all models that were measured; a figure that is missing misses its bar."""
    steps, parts = report["steps"], report["parts"]
    bars = [
        Bar(f"{step}: exit status 0 (1: yes)", _passed(steps.get(step)), 1.0) for step in STEPS
    ]
    for model in sorted({part["model"]["name"] for part in parts.values()}):
        bars += _bars_of_model(
            model, [part for part in parts.values() if part["model"]["name"] == model]
        )
    return bars


def _passed(step: Mapping[str, Any] | None) -> float | None:
    return None if step is None else float(step["status"] == 0)


def _bars_of_model(model: str, parts: Sequence[Mapping[str, Any]]) -> Iterator[Bar]:
    by_name = {part["name"]: part for part in parts}
    main, everything = (by_name.get(f"{model}-{share}") for share in (MAIN_SHARE, 100))
    yield Bar(
        f"{model}: share of requests with the tokens of resident vLLM",
        _identical(parts),
        1.0,
    )
    swept = [by_name.get(f"{model}-{share}-misses") for share in SWEEP_SHARES]
    yield Bar(
        f"{model}: words of any topic, (resident step + copies at the gather's rate) / step, the "
        f"least of {', '.join(SWEEP_SHARES)} and B=1, 8",
        _min([_row(part, workload, "of_serial") for part in swept for workload in SWEPT]),
        OF_SERIAL,
    )
    yield Bar(
        f"{model}: decode B=1 on one topic, 25 % resident, speed of trace / resident vLLM",
        _row(main, "decode-1", "of_resident"),
        OF_RESIDENT,
    )
    yield Bar(
        f"{model}: the same / cpu-offload-gb",
        _ratio(main, "cpu-offload-gb", "trace", "decode-1", "step_s"),
        AGAINST_UVA,
        "x",
    )
    yield Bar(
        f"{model}: everything fits, decode speed / plain vLLM with the same kernels, the least of "
        "what was measured at B=1, 8, 32",
        _least_measured(everything),
        FITS,
    )
    yield Bar(
        f"{model}: prompt of 4096 tokens, 25 % resident, achieved / full-stream bound",
        _row(main, PROMPT, "of_bound"),
        OF_STREAM,
    )


def _row(part: Mapping[str, Any] | None, workload: str, figure: str) -> float | None:
    """A figure of ``trace``; None if it was not measured."""
    for row in summary_rows(part) if part is not None else ():
        if (row["contestant"], row["workload"]) == ("trace", workload):
            found: float | None = row[figure]
            return found
    return None


def _least_measured(part: Mapping[str, Any] | None) -> float | None:
    """The least speed of ``trace`` beside resident vLLM at any batch that both ran at."""
    ratios = (
        _ratio(part, "resident", "trace", f"decode-{batch}", "step_s")
        for batch in DECODE_BATCHES
    )
    return min((ratio for ratio in ratios if ratio is not None), default=None)


def _min(values: Sequence[float | None]) -> float | None:
    """The least; None if one is missing, or all are."""
    known = [value for value in values if value is not None]
    return min(known) if known and len(known) == len(values) else None


def _ratio(
    part: Mapping[str, Any] | None, upper: str, lower: str, workload: str, figure: str
) -> float | None:
    if part is None:
        return None
    found = contestants_of(part)
    above = median_of(found.get(upper), workload, figure)
    below = median_of(found.get(lower), workload, figure)
    return above / below if above and below else None


def _identical(parts: Sequence[Mapping[str, Any]]) -> float | None:
    same = total = 0
    for part in parts:
        found = contestants_of(part)
        for name in found.keys() & {"trace", "lru"}:
            one, all_of_them = same_tokens(found[name], found.get("resident"))
            same, total = same + one, total + all_of_them
    return same / total if total else None
