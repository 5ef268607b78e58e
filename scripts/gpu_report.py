"""The JSON report of the GPU suite: parts merged into one file, bounds, ratios and bars.

    python scripts/gpu_report.py [--results DIR]                show what was measured
    python scripts/gpu_report.py record PART --status N ...     note how a part of the suite ended

Parts come from separate runs, perhaps on separate machines, so each carries its hardware,
versions and commit, and only contestants of the same run of the same part are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.gpu_plan import LONG_PROMPT_TOKENS, RESIDENT_AUTO  # noqa: E402
from scripts.harness.machine import commit, hardware, versions  # noqa: E402
from scripts.harness.options import RESULTS  # noqa: E402
from scripts.harness.report import Bar, bars_table, write_report  # noqa: E402

NAME = "gpu"
STEPS = (
    "build",
    "tests",
    *(f"identity-{number}" for number in range(1, 6)),
    "memcheck",
    "racecheck",
    "smoke",
)
"""Parts of the suite that are no benchmarks."""
TAIL_CHARACTERS = 6000

AGAINST_UVA = 5.0
AGAINST_PREFETCH = 3.0
OF_BOUND = 0.7
OF_RESIDENT = 0.9
OF_STREAM = 0.85
HOST_MEMORY = 1.05
LEVEL = 1
"""Copies planned on the host; OF_BOUND and OF_RESIDENT are that level's bars."""

DECODE_BATCHES = (1, 8, 32)
MAIN_SHARE = 25
"""Per cent of the experts on the device, in the bars that compare offloaders."""
SHARES = (12.5, 25, 50)


# ---- bounds ----------------------------------------------------------------------------


def decode_bound_s(
    resident_step_s: float, miss_bytes_per_step: float, bandwidth_bytes_per_s: float
) -> float:
    """No step can be faster than the resident one, nor than its misses cross the link."""
    return max(resident_step_s, miss_bytes_per_step / bandwidth_bytes_per_s)


def stream_bound_s(
    resident_s: float,
    *,
    expert_bytes: int,
    resident_share: float,
    chunks: int,
    crossing_bytes: float,
    bandwidth_bytes_per_s: float,
) -> float:
    """The same of a prompt that needs all experts in each of its chunks.

    Args:
        resident_s: of the same prompt with everything on the device.
        expert_bytes: of all experts of the model.
        resident_share: of them that lie on the device all the time.
        chunks: forward passes that the prompt is cut into.
        crossing_bytes: what had to cross as counted. Where the prompt left experts out that
            is less than all, and the bound is lower.
    """
    streamed = min(chunks * (1.0 - resident_share) * expert_bytes, crossing_bytes)
    return max(resident_s, streamed / bandwidth_bytes_per_s)


def chunks_of(prompt_tokens: int, chunk_tokens: int) -> int:
    """Forward passes of a prompt."""
    return -(-prompt_tokens // chunk_tokens)


def crossing_bytes(sample: Mapping[str, Any], record_bytes: int) -> int | None:
    """What had to cross the link in a sample: misses, and what was prefetched in time.

    Prefetches that nobody needed are left out: they would make the bound easier to reach.
    None without counters (a contestant that is not the plugin).
    """
    counters = sample.get("counters")
    if counters is None:
        return None
    return int((counters["misses"] + counters["prefetch_useful"]) * record_bytes)


# ---- merging ---------------------------------------------------------------------------


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


# ---- figures of a part -----------------------------------------------------------------


def contestants_of(part: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Contestants that measured something, by name."""
    return {
        name: contestant
        for name, contestant in part["contestants"].items()
        if contestant.get("workloads")
    }


def median_of(contestant: Mapping[str, Any] | None, workload: str, figure: str) -> float | None:
    """Median over the samples of a workload; None if there are none."""
    samples = (contestant or {}).get("workloads", {}).get(workload, [])
    values = [sample[figure] for sample in samples if sample.get(figure) is not None]
    return statistics.median(values) if values else None


def same_tokens(
    one: Mapping[str, Any] | None, other: Mapping[str, Any] | None
) -> tuple[int, int]:
    """How many requests got the same tokens, of how many that both served."""
    same = total = 0
    for workload, samples in (one or {}).get("workloads", {}).items():
        others = (other or {}).get("workloads", {}).get(workload, [])
        by_repeat = {sample["repeat"]: sample["tokens"] for sample in others}
        for sample in samples:
            for mine, theirs in zip(
                sample["tokens"], by_repeat.get(sample["repeat"], []), strict=False
            ):
                same += mine == theirs
                total += 1
    return same, total


def summary_rows(part: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A row per contestant and workload: medians, bound, ratios."""
    found = contestants_of(part)
    resident = found.get("resident")
    for name, contestant in found.items():
        for workload in contestant["workloads"]:
            figure = "step_s" if workload.startswith("decode") else "prefill_s"
            seconds = median_of(contestant, workload, figure)
            base = median_of(resident, workload, figure)
            bound = bound_s(part, contestant, resident, workload)
            counters = [
                sample["counters"]
                for sample in contestant["workloads"][workload]
                if sample.get("counters") is not None
            ]
            needs = sum(counts["hits"] + counts["misses"] for counts in counters)
            hits = sum(counts["hits"] for counts in counters)
            yield {
                "part": part["name"],
                "contestant": name,
                "workload": workload,
                figure: seconds,
                "of_resident": base / seconds if base and seconds else None,
                "bound_s": bound,
                "of_bound": bound / seconds if bound and seconds else None,
                "hit_rate": hits / needs if needs else None,
                "crossing_bytes": median_of(contestant, workload, "crossing_bytes"),
                "device_bytes": contestant.get("memory", {}).get("device_used_bytes"),
                "same_tokens_as_resident": same_tokens(
                    {"workloads": {workload: contestant["workloads"][workload]}}, resident
                ),
            }


def bound_s(
    part: Mapping[str, Any],
    contestant: Mapping[str, Any],
    resident: Mapping[str, Any] | None,
    workload: str,
) -> float | None:
    """The bound of a contestant's workload; None where a figure of it is missing."""
    bandwidth = (part.get("link") or {}).get("bytes_per_s")
    crossing = median_of(contestant, workload, "crossing_bytes")
    is_decode = workload.startswith("decode")
    seconds = median_of(resident, workload, "step_s" if is_decode else "prefill_s")
    if bandwidth is None or crossing is None or seconds is None:
        return None
    if is_decode:
        steps = median_of(contestant, workload, "steps")
        return None if steps is None else decode_bound_s(seconds, crossing / steps, bandwidth)
    return stream_bound_s(
        seconds,
        expert_bytes=part["model"]["expert_bytes"],
        resident_share=part["share"] / 100,
        chunks=chunks_of(int(workload.rpartition("-")[2]), part["parameters"]["chunk_tokens"]),
        crossing_bytes=crossing,
        bandwidth_bytes_per_s=bandwidth,
    )


# ---- bars ------------------------------------------------------------------------------


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


# ---- the command line ------------------------------------------------------------------


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
                    for key in ("of_resident", "of_bound", "hit_rate")
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
