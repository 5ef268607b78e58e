"""What API servers show: counters on ``/metrics``, and a line in the log with vLLM's own."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import REGISTRY, Collector

from vllm_moe_offload.integration import failures, patching
from vllm_moe_offload.integration.counters_dir import at_exit_of_creator, counters_dir
from vllm_moe_offload.metrics import (
    CounterReading,
    hit_rate,
    merge,
    merge_by_labels,
    read_counters,
)

logger = logging.getLogger("vllm.moe_offload")

PREFIX = "vllm:moe_offload_"
LABELS = ("model_name", "engine", "rank")
"""As vLLM's own metrics have them, and the worker's number among all of the engine's."""
EXPORTED_COUNTERS = {
    "hits": "Distinct experts of layer calls that were resident.",
    "misses": "Distinct experts of layer calls that were not resident.",
    "draft_hits": "Of the hits, those of a drafter's own experts.",
    "draft_misses": "Of the misses, those of a drafter's own experts.",
    "bypasses": "Misses that were used once and not kept: nobody was evicted for them.",
    "read_bytes": "Bytes of experts brought into the cache: from the store, or to a GPU.",
    "prefetch_issued": "Experts read ahead of their layer.",
    "prefetch_useful": "Experts read ahead that were there when their layer needed them.",
    "prefetch_late": "Experts read ahead that were under way when their layer needed them.",
    "prefetch_wasted": "Experts read ahead that left unused.",
    "stall_seconds": "Time layer calls waited for reads.",
}
EXPORTED_GAUGES = {
    "slots": "Experts that the cache keeps between layer calls; staging slots are not counted.",
    "resident_experts": "Experts that are in the cache.",
    "cache_bytes": "Memory of cache slots and staging slots.",
}
EXPORTED_STATES: dict[str, tuple[str, Callable[[CounterReading], float]]] = {
    "up": (
        "1 while the worker runs, 0 after its end.",
        lambda reading: float(reading.is_running),
    ),
    "counters_age_seconds": (
        "How old the figures of a worker on another host are while it works; else 0.",
        lambda reading: reading.age_seconds,
    ),
}
INFO_LABELS = ("policy", "prefetch", "version", "part", "way")
OVERDUE_SECONDS = 10.0
"""Figures of a worker that works are said to be missing when they are older than this."""


class OffloadCollector(Collector):
    """Reads the workers' counter files at every scrape, in whichever API server answers."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def collect(self) -> Iterator[Metric]:
        """One family per metric, one sample per worker."""
        readings = merge_by_labels(read_counters(self._directory))
        labels = [[reading.labels[name] for name in LABELS] for reading in readings]
        family: CounterMetricFamily | GaugeMetricFamily
        for name, documentation in EXPORTED_COUNTERS.items():
            family = CounterMetricFamily(PREFIX + name, documentation, labels=LABELS)
            for of_worker, reading in zip(labels, readings, strict=True):
                family.add_metric(of_worker, reading.values[name])
            yield family
        for name, documentation in EXPORTED_GAUGES.items():
            family = GaugeMetricFamily(PREFIX + name, documentation, labels=LABELS)
            for of_worker, reading in zip(labels, readings, strict=True):
                family.add_metric(of_worker, reading.values[name])
            yield family
        for name, (documentation, state) in EXPORTED_STATES.items():
            family = GaugeMetricFamily(PREFIX + name, documentation, labels=LABELS)
            for of_worker, reading in zip(labels, readings, strict=True):
                family.add_metric(of_worker, state(reading))
            yield family
        # A gauge, as vLLM's cache_config_info is: LLM.get_metrics() knows no other type.
        family = GaugeMetricFamily(
            f"{PREFIX}policy_info",
            "Always 1; the labels say how the worker decides.",
            labels=(*LABELS, *INFO_LABELS),
        )
        for of_worker, reading in zip(labels, readings, strict=True):
            for info in reading.infos:
                family.add_metric([*of_worker, *(info[name] for name in INFO_LABELS)], 1)
        yield family


# LoggingStatLogger.log (v1/metrics/loggers.py)
#   why: the plugin's line belongs beside vLLM's own, as often as that is logged.
#   upstream: plugins of the group vllm.stat_logger_plugins are loaded with and without offload,
#     and switch statistics on where --disable-log-stats switched them off (async_llm.py).
#   remove when: a stat logger plugin can say that it is not wanted.
# MultiProcessCollector.collect (prometheus_client/multiprocess.py)
#   why: with several API servers /metrics is served from registries that vLLM's
#     instrumentation makes for each scrape, with this one collector in them.
#   upstream: v1/metrics/prometheus.py (get_prometheus_registry).
#   remove when: the instrumentation takes the registry that it is given in that mode too.
def install() -> None:
    """Adds collector and stats line to this process, which serves with offload; once."""
    from vllm.v1.metrics import loggers

    directory = counters_dir()
    if directory is None or directory in _installed:
        return
    _installed.add(directory)
    REGISTRY.register(OffloadCollector(directory))
    patching.wrap(MultiProcessCollector, "collect", _collect_with_offload)
    patching.wrap(loggers.LoggingStatLogger, "log", _log_with_offload)
    at_exit_of_creator(_log_summary)


_installed: set[Path] = set()


def _collect_with_offload(original: Any, self: Any) -> list[Any]:
    directory = counters_dir()
    own = [] if directory is None else list(OffloadCollector(directory).collect())
    return [*original(self), *own]


def _log_with_offload(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, *args, **kwargs)
    directory = counters_dir()
    if directory is not None:
        readings = list(read_counters(directory))
        totals = Counter(merge(readings).values)
        previous = cast(Counter[str], getattr(self, "_moe_offload_totals", Counter()))
        self._moe_offload_totals = totals
        line = stats_line(totals, previous)
        if line:
            logger.info("%s", line)
        self._moe_offload_overdue = warn_of_overdue(
            readings, getattr(self, "_moe_offload_overdue", frozenset())
        )
    return result


def warn_of_overdue(
    readings: Sequence[CounterReading], known: frozenset[str]
) -> frozenset[str]:
    """Names workers whose figures do not arrive, once until they arrive again.

    Args:
        readings: of all workers.
        known: names of those that were overdue last time.

    Returns:
        Names of those that are.
    """
    overdue = {
        reading.name: reading.age_seconds
        for reading in readings
        if reading.age_seconds > OVERDUE_SECONDS
    }
    for name, seconds in overdue.items():
        if name not in known:
            logger.warning(
                "MoE offload: no counters of %s for %d s; what is shown of it is that old",
                name,
                seconds,
            )
    return frozenset(overdue)


def _log_summary(directory: Path) -> None:
    line = stats_line(Counter(merge(read_counters(directory)).values), Counter())
    if not line:
        return
    failure = failures.known_failure()
    if failure is not None and failure.ended_ranks:
        line += f", ended before: {', '.join(failure.ended_ranks)}"
    logger.info("%s", line.replace("MoE offload:", "MoE offload, all in all:", 1))


def stats_line(totals: Counter[str], previous: Counter[str]) -> str:
    """What happened between two readings; empty if nothing ran."""
    change = {name: totals[name] - previous[name] for name in totals}
    if not change.get("calls"):
        return ""
    if not change["hits"] + change["misses"]:  # nobody had to look
        return f"MoE offload: resident: all {int(totals['resident_experts'])} experts"
    tokens = max(change["tokens"], 1)
    stalled, ahead = "", ""
    if change["busy_seconds"]:  # of a step that a GPU plans the host knows no more than its end
        share = 100 * change["stall_seconds"] / change["busy_seconds"]
        stalled = f"stalled on reads: {share:.1f}% of step time, "
    if change["prefetch_issued"]:
        needed = int(change["prefetch_useful"] + change["prefetch_late"])
        ahead = f"read ahead: {int(change['prefetch_issued'])}, needed: {needed}, "
    return (
        f"MoE offload: hit rate: {100 * hit_rate(change['hits'], change['misses']):.1f}%, "
        f"read: {change['read_bytes'] / tokens / 1e6:.1f} MB/token, "
        f"{ahead}{stalled}"
        f"resident experts: {int(totals['resident_experts'])}"
    )
