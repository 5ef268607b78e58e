"""The rule of a cache that the device plans, beside today's planner and ``lrfu``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.harness.report import Bar
from scripts.replay_questions.cells import Row, log, requests_at
from vllm_moe_offload.cache.planner import CacheShape, ExpertCache
from vllm_moe_offload.cache.sizing import cache_shape
from vllm_moe_offload.policy import make_policy
from vllm_moe_offload.replay.one_pool import replay_schedule
from vllm_moe_offload.replay.run import capacity_slots, replay_step
from vllm_moe_offload.replay.schedule import Schedule, decode_schedule, recorded_schedule
from vllm_moe_offload.trace.routing import RoutingTrace, load_trace

CAPACITIES = (0.25, 0.5)
CONCURRENCIES = (1, 4, 8)
BELOW_FREE_STAGING = {1: 0.002, 4: 0.015, 8: 0.025}
"""By concurrency: how far the rule may be below a planner that has staging slots for nothing."""


@dataclass(frozen=True)
class Workload:
    """Steps of a trace; ``concurrency``: requests at a time, at most."""

    name: str
    trace: RoutingTrace
    schedule: Schedule
    concurrency: int
    requests: int


def workloads(
    path: Path, trace: RoutingTrace, real: Sequence[Path], quick: bool
) -> Iterator[Workload]:
    """One token of every request per step of ``trace``; the servers' own steps of the others."""
    for concurrency in CONCURRENCIES:
        count = requests_at(trace, concurrency, quick) or trace.num_requests
        schedule = decode_schedule(trace, concurrency, count)
        yield Workload(path.name, trace, schedule, concurrency, count)
    for recorded in real:
        other = load_trace(recorded).as_recorded()
        schedule = recorded_schedule(other)
        steps = map(schedule.tokens, range(schedule.num_steps))
        concurrency = max(len(tokens.requests) for tokens in steps)
        yield Workload(recorded.name, other, schedule, concurrency, other.num_requests)


def device(found: Iterator[Workload]) -> list[Row]:
    """Hit rates at each capacity: one pool; so many slots and free staging; staging of them."""
    rows = []
    for workload in found:
        for capacity in CAPACITIES:
            rows.append(_row(workload, capacity))
            log(f"device: {rows[-1]}")
    return rows


def _row(workload: Workload, capacity: float) -> Row:
    trace, schedule = workload.trace, workload.schedule
    shape = (trace.num_layers, trace.num_experts)
    slots = capacity_slots(capacity, *shape)
    rules = make_policy("lrfu", *shape).rules
    staged = cache_shape(
        slots, num_layers=shape[0], num_experts=shape[1], top_k=trace.top_k, rules=rules
    )
    pool = replay_schedule(trace, schedule, slots)
    free = ExpertCache(CacheShape(*shape, slots), rules, unbounded_staging=True)
    return {
        "trace": workload.name,
        "requests": workload.requests,
        "concurrency": workload.concurrency,
        "capacity": capacity,
        "slots": slots,
        "staging_slots": staged.num_staging_slots,
        "one_pool": pool.hits / (pool.hits + pool.misses),
        "free_staging": _host_hit_rate(workload, free),
        "staging_in_slots": _host_hit_rate(workload, ExpertCache(staged, rules)),
    }


def _host_hit_rate(workload: Workload, cache: ExpertCache) -> float:
    """By ``lrfu``; none of these traces has a drafter, whose guesses would have to be verified."""
    schedule, routed = workload.schedule, workload.trace.routed
    assert schedule.is_draft is None
    policy = make_policy("lrfu", cache.shape.num_layers, cache.shape.num_experts)
    policy.bind(cache)
    for step in range(schedule.num_steps):
        replay_step(policy, cache, schedule.tokens(step), schedule.ids(routed, step))
    hits, misses = cache.count("hits"), cache.count("misses")
    return hits / (hits + misses)


def bars_of(rows: list[Row]) -> list[Bar]:
    """A little below what nobody can have, never below what there is today."""
    bars = []
    for row in rows:
        cell = "{trace}, B={concurrency}, c={capacity:g}".format(**row)
        allowed = -BELOW_FREE_STAGING[row["concurrency"]]
        free, staged = (
            row["one_pool"] - row[key] for key in ("free_staging", "staging_in_slots")
        )
        bars.append(Bar(f"one pool - free staging, {cell}", free, allowed))
        bars.append(Bar(f"one pool - staging in the slots, {cell}", staged, 0))
    return bars
