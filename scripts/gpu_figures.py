"""What the samples of a part of the GPU benchmark come to: medians, bounds, ratios.

A part is what one run measured on one model and share of its experts on the device; only its
contestants are compared with each other.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any


def decode_bound_s(
    resident_step_s: float, miss_bytes_per_step: float, bandwidth_bytes_per_s: float
) -> float:
    """No step can be faster than the resident one, nor than its misses cross the link."""
    return max(resident_step_s, miss_bytes_per_step / bandwidth_bytes_per_s)


def serial_s(
    resident_step_s: float, miss_bytes_per_step: float, gather_bytes_per_s: float
) -> float:
    """A step that computes like the resident one, and copies while it does not."""
    return resident_step_s + miss_bytes_per_step / gather_bytes_per_s


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
            serial = serial_step_s(part, contestant, resident, workload)
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
                "serial_s": serial,
                "of_serial": serial / seconds if serial and seconds else None,
                "misses_per_step": misses_per_step(contestant, workload),
                "hit_rate": hits / needs if needs else None,
                "crossing_bytes": median_of(contestant, workload, "crossing_bytes"),
                "device_bytes": contestant.get("memory", {}).get("device_used_bytes"),
                "same_tokens_as_resident": same_tokens(
                    {"workloads": {workload: contestant["workloads"][workload]}}, resident
                ),
            }


def misses_per_step(contestant: Mapping[str, Any], workload: str) -> float | None:
    """What had to cross in a decode step, in experts: the median; None where it is not known."""
    if not workload.startswith("decode"):
        return None
    found = []
    for sample in contestant["workloads"][workload]:
        counters = sample.get("counters")
        # Between two looks at a device's counters other steps lie than between two outputs.
        steps = (counters or {}).get("steps") or sample["steps"]
        if counters is not None and steps:
            found.append((counters["misses"] + counters.get("prefetch_useful", 0)) / steps)
    return statistics.median(found) if found else None


def serial_step_s(
    part: Mapping[str, Any],
    contestant: Mapping[str, Any],
    resident: Mapping[str, Any] | None,
    workload: str,
) -> float | None:
    """See :func:`serial_s`; None where a figure of it is missing."""
    rate = (part.get("link") or {}).get("gather_bytes_per_s")
    misses = misses_per_step(contestant, workload)
    resident_step_s = median_of(resident, workload, "step_s")
    if rate is None or misses is None or resident_step_s is None:
        return None
    return serial_s(resident_step_s, misses * part["model"]["record_bytes"], rate)


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
        misses = misses_per_step(contestant, workload)
        if misses is None:
            return None
        return decode_bound_s(seconds, misses * part["model"]["record_bytes"], bandwidth)
    return stream_bound_s(
        seconds,
        expert_bytes=part["model"]["expert_bytes"],
        resident_share=part["share"] / 100,
        chunks=chunks_of(int(workload.rpartition("-")[2]), part["parameters"]["chunk_tokens"]),
        crossing_bytes=crossing,
        bandwidth_bytes_per_s=bandwidth,
    )
