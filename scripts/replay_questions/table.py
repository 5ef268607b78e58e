"""Every policy in every cell."""

from __future__ import annotations

from scripts.harness.report import Bar
from scripts.replay_questions.cells import (
    CAPACITIES,
    CONCURRENCIES,
    NEVER_LOSES_BY,
    PLAIN,
    Row,
    margin,
    measure,
    requests_at,
)
from vllm_moe_offload.trace.routing import RoutingTrace

POLICIES = (*PLAIN, "lrfu:half_life=32", "eamc", "trace", "belady")
TARGETS = {
    (1, 0.125): 0.452,
    (1, 0.25): 0.685,
    (1, 0.5): 0.921,
    (4, 0.125): 0.268,
    (4, 0.25): 0.487,
    (4, 0.5): 0.808,
    (8, 0.125): 0.211,
    (8, 0.25): 0.410,
    (8, 0.5): 0.743,
    (32, 0.25): 0.302,
}
"""What ``trace`` must reach on the gpt-oss-20b trace."""
SPEED_CELL = (8, 0.25)
PLAIN_SECONDS = 60.0
TRACE_SLOWER = 5.0
"""The whole trace by all plain policies together, and how much slower ``trace`` may be."""


def table(trace: RoutingTrace, quick: bool) -> list[Row]:
    """Every policy in every cell."""
    return [
        measure(trace, policy, capacity, b, requests_at(trace, b, quick))
        for b in CONCURRENCIES
        for capacity in CAPACITIES
        for policy in POLICIES
    ]


def bars_of(rows: list[Row]) -> list[Bar]:
    """Targets of the cells, the greatest loss anywhere, and what replaying costs."""
    bars, margins = [], []
    for b in CONCURRENCIES:
        for capacity in CAPACITIES:
            rates = {
                row["policy"]: row["hit_rate"]
                for row in rows
                if row["concurrency"] == b and row["capacity"] == capacity
            }
            margins.append(margin(rates))
            target = TARGETS.get((b, capacity))
            if target is not None:
                bars.append(Bar(f"trace, B={b}, c={capacity:g}", rates["trace"], target))
    bars.append(Bar("trace - best plain, worst cell", min(margins), -NEVER_LOSES_BY))
    return bars + speed_bars(rows)


def speed_bars(rows: list[Row]) -> list[Bar]:
    """CPU seconds in one cell."""
    seconds = {
        row["policy"]: row["cpu_seconds"]
        for row in rows
        if (row["concurrency"], row["capacity"]) == SPEED_CELL
    }
    plain = sum(seconds[policy] for policy in PLAIN)
    slower = seconds["trace"] / plain
    cell = "B={}, c={:g}".format(*SPEED_CELL)
    return [
        Bar(f"all plain policies, {cell}", plain, PLAIN_SECONDS, "s", at_least=False),
        Bar(f"trace / all plain policies, {cell}", slower, TRACE_SLOWER, "x", at_least=False),
    ]
