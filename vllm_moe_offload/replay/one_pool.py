"""Replay of a routing trace by the rule of a cache that the device plans (``device/rule.py``).

Schedules, capacity and what counts as a hit are those of ``run.py``. But staging is not free: every
miss takes one of the slots, so figures of both are not of the same memory unless what the host
planner stages in is counted, too.
"""

from __future__ import annotations

from vllm_moe_offload.device.rule import OnePool, fixed_point
from vllm_moe_offload.policy import make_policy
from vllm_moe_offload.policy.plain import LRFU
from vllm_moe_offload.replay.run import Progress, ReplayResult, capacity_slots, result_of
from vllm_moe_offload.replay.schedule import (
    ReplayError,
    Schedule,
    decode_schedule,
    recorded_schedule,
)
from vllm_moe_offload.trace.routing import RoutingTrace


def half_life_of(policy: str, num_layers: int, num_experts: int) -> float:
    """Half-life in steps of the scores that ``policy`` asks for.

    Raises:
        ReplayError: another policy than ``lrfu``, which is the only one that the device has.
        ValueError: no such policy or parameter; says which exist.
    """
    chosen = make_policy(policy, num_layers, num_experts)
    if not isinstance(chosen, LRFU):
        raise ReplayError(
            f"policy must be lrfu or lrfu:half_life=STEPS with --planner device, got {policy}"
        )
    return chosen.half_life_steps


def pool_slots(capacity: float, num_layers: int, num_experts: int) -> int:
    """Slots that ``capacity`` stands for; at least one, since there is nothing beside the pool."""
    slots = capacity_slots(capacity, num_layers, num_experts)
    if not slots:
        raise ReplayError(
            f"capacity must be at least 1/{num_layers * num_experts}, one expert, with "
            f"--planner device, got {capacity:g}"
        )
    return slots


def replay_one_pool(
    trace: RoutingTrace,
    policy: str,
    capacity: float,
    concurrency: int,
    *,
    num_requests: int | None = None,
    progress: Progress | None = None,
) -> ReplayResult:
    """As ``run.replay``, with all slots in one pool.

    Raises:
        ReplayError, ValueError: a parameter is out of range; says which and why.
    """
    slots = pool_slots(capacity, trace.num_layers, trace.num_experts)
    schedule = decode_schedule(trace, concurrency, num_requests)
    pool = replay_schedule(trace, schedule, slots, policy, progress)
    return _result(policy, capacity, concurrency, schedule, pool)


def replay_one_pool_recorded(
    trace: RoutingTrace, policy: str, *, progress: Progress | None = None
) -> ReplayResult:
    """As ``run.replay_recorded``; the pool has the server's slots and staging slots."""
    schedule = recorded_schedule(trace)
    trace = trace.as_recorded()
    recorded = trace.schedule
    assert recorded is not None
    total = trace.num_layers * trace.num_experts
    slots = min(recorded.slots + recorded.staging_slots, total)
    pool = replay_schedule(trace, schedule, slots, policy, progress)
    return _result(policy, slots / total, None, schedule, pool)


def replay_schedule(
    trace: RoutingTrace,
    schedule: Schedule,
    slots: int,
    policy: str = "lrfu",
    progress: Progress | None = None,
) -> OnePool:
    """A pool of so many slots after the steps of ``schedule``.

    A drafter's guesses have votes like other tokens.
    """
    shape = (trace.num_layers, trace.num_experts)
    pool = OnePool(*shape, slots, half_life_of(policy, *shape))
    routed = trace.routed
    for step in range(schedule.num_steps):
        tokens = schedule.tokens(step)
        weights = fixed_point(tokens.weights)
        for layer, ids in enumerate(schedule.ids(routed, step)):
            pool.observe(layer, ids, weights)
            while not pool.is_served:
                pool.place(layer)
        if progress is not None:
            progress(tokens.request_of_token.size)
    return pool


def _result(
    policy: str, capacity: float, concurrency: int | None, schedule: Schedule, pool: OnePool
) -> ReplayResult:
    counted = (pool.hits, pool.misses)
    return result_of(policy, capacity, concurrency, schedule, counted, planner="device")
