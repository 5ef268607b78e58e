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
from scripts.gpu_plan import LONG_PROMPT_TOKENS, RESIDENT_AUTO  # noqa: E402
from scripts.harness.report import Bar  # noqa: E402

STEPS = (
    "build",
    "tests",
    *(f"identity-{number}" for number in range(1, 6)),
    "memcheck",
    "racecheck",
    "smoke",
)
"""Parts of the suite that are no benchmarks."""

AGAINST_UVA = 5.0
AGAINST_PREFETCH = 3.0
OF_BOUND = 0.7
OF_RESIDENT = 0.9
OF_STREAM = 0.85
HOST_MEMORY = 1.05
DECODE_BATCHES = (1, 8, 32)
MAIN_SHARE = 25
"""Per cent of the experts on the device, in the bars that compare offloaders."""
SHARES = (12.5, 25, 50)


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
    by_share = {part["share"]: part for part in parts}
    main, everything = by_share.get(MAIN_SHARE), by_share.get(100)
    yield Bar(
        f"{model}: share of requests with the tokens of resident vLLM",
        _identical(parts),
        1.0,
    )
    for other, limit in (
        ("cpu-offload-gb", AGAINST_UVA),
        ("vllm-prefetch", AGAINST_PREFETCH),
    ):
        yield Bar(
            f"{model}: decode B=1, 25 % resident, speed of trace / {other}",
            _ratio(main, other, "trace", "decode-1", "step_s"),
            limit,
            "x",
        )
    yield Bar(
        f"{model}: trace, achieved / bound, the least of 12.5, 25, 50 % and B=1, 8, 32",
        _least(by_share, [(s, f"decode-{b}") for s in SHARES for b in DECODE_BATCHES]),
        OF_BOUND,
    )
    for plain, kernels in (
        ("resident", "the same kernels"),
        (RESIDENT_AUTO, "its own choice of kernels"),
    ):
        ratios = [
            _ratio(everything, plain, "trace", f"decode-{batch}", "step_s")
            for batch in DECODE_BATCHES
        ]
        yield Bar(
            f"{model}: everything fits, decode speed / plain vLLM with {kernels}, "
            "the least of B=1, 8, 32",
            _min(ratios),
            OF_RESIDENT,
        )
    yield Bar(
        f"{model}: prefill of 32K tokens, 25 % resident, achieved / full-stream bound",
        _least(by_share, [(MAIN_SHARE, f"prefill-{LONG_PROMPT_TOKENS}")]),
        OF_STREAM,
    )
    yield Bar(
        f"{model}: host memory beyond resident vLLM's / expert bytes, the most of all shares",
        _host_memory([part for part in parts if part["share"] != 100]),
        HOST_MEMORY,
        at_least=False,
    )


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


def _least(
    by_share: Mapping[float, Mapping[str, Any]], cells: Sequence[tuple[float, str]]
) -> float | None:
    """The least achieved / bound of ``trace``; None if a cell was not measured."""
    ratios: list[float | None] = []
    for share, workload in cells:
        rows = summary_rows(by_share[share]) if share in by_share else iter(())
        ratios.append(
            next(
                (
                    row["of_bound"]
                    for row in rows
                    if row["contestant"] == "trace" and row["workload"] == workload
                ),
                None,
            )
        )
    return _min(ratios)


def _identical(parts: Sequence[Mapping[str, Any]]) -> float | None:
    same = total = 0
    for part in parts:
        found = contestants_of(part)
        for name in found.keys() & {"trace", "lru"}:
            one, all_of_them = same_tokens(found[name], found.get("resident"))
            same, total = same + one, total + all_of_them
    return same / total if total else None


def _host_memory(parts: Sequence[Mapping[str, Any]]) -> float | None:
    ratios = []
    for part in parts:
        found = contestants_of(part)
        # Without a device, plain vLLM holds the experts in host memory, too.
        if part["device"] != "cuda":
            continue
        resident = found.get("resident", {}).get("memory")
        for name in found.keys() & {"trace", "lru"}:
            held, base = (
                (memory or {}).get("host_anonymous_bytes")
                for memory in (found[name].get("memory"), resident)
            )
            if held is not None and base is not None:
                ratios.append((held - base) / part["model"]["expert_bytes"])
    return max(ratios) if ratios else None
