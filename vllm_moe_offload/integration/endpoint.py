"""What API servers show: counters on ``/metrics``, one line in vLLM's stats rhythm."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry

from vllm_moe_offload.integration import compat
from vllm_moe_offload.integration.counters_dir import at_exit_of_creator, counters_dir
from vllm_moe_offload.metrics import CounterReading, hit_rate, read_counters

logger = logging.getLogger("vllm.moe_offload")

LABELS = ("model_name", "engine", "rank")
EXPORTED = {
    "hits": "Distinct experts of layer calls that were resident.",
    "misses": "Distinct experts of layer calls that had to be read.",
    "read_bytes": "Bytes of experts read from the store.",
    "stall_seconds": "Time layer calls waited for reads.",
}


class OffloadCollector(Collector):
    """Reads the workers' counter files at every scrape, in whichever API server answers."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def collect(self) -> Iterator[CounterMetricFamily]:
        """One family per counter, one sample per worker."""
        readings = list(read_counters(self._directory))
        for name, documentation in EXPORTED.items():
            family = CounterMetricFamily(
                f"vllm:moe_offload_{name}", documentation, labels=LABELS
            )
            for reading in readings:
                family.add_metric(
                    [str(reading.labels[label]) for label in LABELS], reading.values[name]
                )
            yield family


# get_prometheus_registry (v1/metrics/prometheus.py)
#   why: with several API servers vLLM builds a registry of its own for /metrics, in which a
#     collector registered with REGISTRY does not show.
#   remove when: vLLM has a hook for collectors.
# LoggingStatLogger.log (v1/metrics/loggers.py)
#   why: our line belongs beside vLLM's own, in the same rhythm.
#   remove when: stat logger plugins can be added to a server without replacing its command.
def install() -> None:
    """Adds collector and stats line to this process, if it serves with offload."""
    from vllm.v1.metrics import loggers, prometheus

    compat.wrap(prometheus, "get_prometheus_registry", _registry_with_collector)
    importer = sys.modules.get("vllm.entrypoints.serve.instrumentator.metrics")
    if importer is not None:
        importer.get_prometheus_registry = prometheus.get_prometheus_registry
    compat.wrap(loggers.LoggingStatLogger, "log", _log_with_offload)
    at_exit_of_creator(_log_summary)


_has_collector: set[int] = set()


def _registry_with_collector(original: Any) -> CollectorRegistry:
    registry: CollectorRegistry = original()
    directory = counters_dir()
    if directory is not None and id(registry) not in _has_collector:
        _has_collector.add(id(registry))
        registry.register(OffloadCollector(directory))
    return registry


def _log_with_offload(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, *args, **kwargs)
    directory = counters_dir()
    if directory is not None:
        totals = sum_values(read_counters(directory))
        previous = getattr(self, "_moe_offload_totals", Counter())
        self._moe_offload_totals = totals
        line = stats_line(totals, previous)
        if line:
            logger.info("%s", line)
    return result


def _log_summary(directory: Path) -> None:
    line = stats_line(sum_values(read_counters(directory)), Counter())
    if line:
        logger.info("%s", line.replace("MoE offload:", "MoE offload, all in all:", 1))


def sum_values(readings: Iterator[CounterReading]) -> Counter[str]:
    """Counters of all workers together."""
    totals: Counter[str] = Counter()
    for reading in readings:
        totals.update(reading.values)
    return totals


def stats_line(totals: Counter[str], previous: Counter[str]) -> str:
    """What happened between two readings; empty if nothing ran."""
    change = {name: totals[name] - previous[name] for name in totals}
    if not change.get("calls"):
        return ""
    tokens = max(change["tokens"], 1)
    return (
        f"MoE offload: hit rate: {100 * hit_rate(change['hits'], change['misses']):.1f}%, "
        f"read: {change['read_bytes'] / tokens / 1e6:.1f} MB/token, "
        f"stalled on reads: {100 * change['stall_seconds'] / max(change['busy_seconds'], 1e-9):.1f}% "
        f"of step time, resident experts: {int(totals['resident_experts'])}"
    )
