"""Cells of capacity and concurrency, and the replay of one of them."""

from __future__ import annotations

import sys
import time
from typing import Any

from vllm_moe_offload.replay.run import replay
from vllm_moe_offload.trace.routing import RoutingTrace

PLAIN = ("lru", "lru-layer", "lfu", "lrfu")
CAPACITIES = (0.125, 0.25, 0.5)
CONCURRENCIES = (1, 4, 8, 32)
FEW_REQUESTS = 100
NEVER_LOSES_BY = 0.003

Row = dict[str, Any]


def log(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


def measure(
    trace: RoutingTrace, policy: str, capacity: float, concurrency: int, requests: int | None
) -> Row:
    """One cell: the replay's figures and its CPU seconds."""
    began = time.process_time()
    result = replay(trace, policy, capacity, concurrency, num_requests=requests)
    seconds = time.process_time() - began
    log(f"B={concurrency} c={capacity:g} {policy}: {result.hit_rate:.4f} in {seconds:.1f} s")
    return {**result.as_dict(), "cpu_seconds": round(seconds, 2)}


def requests_at(trace: RoutingTrace, concurrency: int, quick: bool) -> int | None:
    """How many requests a cell replays."""
    if quick:
        return min(4, trace.num_requests)
    return min(FEW_REQUESTS, trace.num_requests) if concurrency < 8 else None


def margin(rates: dict[str, float]) -> float:
    """How far ``trace`` lies above the best plain policy."""
    return rates["trace"] - max(rates[policy] for policy in PLAIN)
