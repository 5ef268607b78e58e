"""Replay of a routing trace: the cache and policy objects that serve, without the model.

Rules (so that numbers compare): capacity c means ``floor(c * layers * experts)`` slots over
all layers. The first B requests are active; when one ends, the next in file order starts at
the following step; each step decodes one token of every active request. The need of a layer
is its set of distinct experts, each counted once, hits before any change. Staging is free and
unlimited, reads take no time, experts of the current need are not evicted. A recorded
schedule (``vllm_moe_offload/trace/routing.py``) replays the server's own steps instead, with
its slots and staging slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.cache.planner import (
    PLAN_INSTANT,
    PLAN_UNPINNED,
    CacheShape,
    ExpertCache,
)
from vllm_moe_offload.policy import Policy, make_policy
from vllm_moe_offload.policy.belady import Belady
from vllm_moe_offload.replay.schedule import (
    ReplayError,
    Schedule,
    decode_schedule,
    recorded_schedule,
)
from vllm_moe_offload.step import StepTokens, count_votes
from vllm_moe_offload.trace.routing import RoutingTrace

Progress = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What one policy did at one capacity and concurrency (None: the server's own).

    ``planner``: who decides where experts go, the core on the host or the device's rule.
    """

    policy: str
    capacity: float
    concurrency: int | None
    hit_rate: float
    misses_per_token: float
    hits: int
    misses: int
    tokens: int
    planner: str = "host"

    def as_dict(self) -> dict[str, Any]:
        """For JSON: without a concurrency that does not apply."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def capacity_slots(capacity: float, num_layers: int, num_experts: int) -> int:
    """Slots that ``capacity``, a share of all experts in (0, 1], stands for."""
    if not 0 < capacity <= 1:
        raise ReplayError(f"capacity must lie in (0, 1], got {capacity:g}")
    return int(capacity * num_layers * num_experts)


def replay(
    trace: RoutingTrace,
    policy: str,
    capacity: float,
    concurrency: int,
    *,
    num_requests: int | None = None,
    progress: Progress | None = None,
    timeline: list[tuple[int, int]] | None = None,
) -> ReplayResult:
    """Replays the first ``num_requests`` requests by the rules of the module.

    ``progress`` is called with the number of tokens done since its last call. ``timeline``
    receives hits and misses so far after every step.

    Raises:
        ReplayError, ValueError: a parameter is out of range; says which and why.
    """
    chosen, cache = unstaged(trace, policy, capacity)
    schedule = decode_schedule(trace, concurrency, num_requests)
    for tokens in _run(trace, schedule, chosen, cache):
        if timeline is not None:
            timeline.append(_counted(cache))
        if progress is not None:
            progress(tokens.request_of_token.size)
    return result_of(policy, capacity, concurrency, schedule, _counted(cache))


def replay_recorded(
    trace: RoutingTrace,
    policy: str,
    *,
    capacity: float | None = None,
    progress: Progress | None = None,
) -> ReplayResult:
    """Replays the server's own steps with its slots (or those of ``capacity``).

    With expert parallelism: of the worker that recorded them, whose experts were some of all.
    """
    schedule = recorded_schedule(trace)
    trace = trace.as_recorded()
    recorded = trace.schedule
    assert recorded is not None
    shape = (trace.num_layers, trace.num_experts)
    slots = recorded.slots if capacity is None else capacity_slots(capacity, *shape)
    chosen = make_policy(policy, *shape)
    cache = ExpertCache(
        CacheShape(*shape, slots, recorded.staging_slots),
        chosen.rules,
        unbounded_staging=recorded.staging_slots == 0,
    )
    for tokens in _run(trace, schedule, chosen, cache):
        if progress is not None:
            progress(tokens.request_of_token.size)
    capacity = slots / (shape[0] * shape[1])
    return result_of(policy, capacity, None, schedule, _counted(cache))


def unstaged(trace: RoutingTrace, policy: str, capacity: float) -> tuple[Policy, ExpertCache]:
    """A policy, and a cache of ``capacity`` with all the staging slots that are ever needed."""
    shape = (trace.num_layers, trace.num_experts)
    chosen = make_policy(policy, *shape)
    slots = capacity_slots(capacity, *shape)
    return chosen, ExpertCache(CacheShape(*shape, slots), chosen.rules, unbounded_staging=True)


def result_of(
    policy: str,
    capacity: float,
    concurrency: int | None,
    schedule: Schedule,
    counted: tuple[int, int],
    *,
    planner: str = "host",
) -> ReplayResult:
    """What a replay of ``schedule`` that ``counted`` these hits and misses says."""
    hits, misses = counted
    tokens = int(schedule.token.size)
    return ReplayResult(
        policy=policy,
        capacity=capacity,
        concurrency=concurrency,
        hit_rate=hits / max(hits + misses, 1),
        misses_per_token=misses / max(tokens, 1),
        hits=hits,
        misses=misses,
        tokens=tokens,
        planner=planner,
    )


def _counted(cache: ExpertCache) -> tuple[int, int]:
    return cache.count("hits"), cache.count("misses")


def _run(
    trace: RoutingTrace, schedule: Schedule, policy: Policy, cache: ExpertCache
) -> Iterator[StepTokens]:
    """Replays ``schedule`` and yields each step's tokens once it is done."""
    flags = PLAN_INSTANT
    routed = trace.routed
    policy.bind(cache)
    if isinstance(policy, Belady):
        policy.foresee(schedule.offsets, routed[schedule.token])
        flags |= PLAN_UNPINNED
    for step in range(schedule.num_steps):
        if schedule.is_draft is not None:
            policy.verify(schedule.ends(step))
        for request in schedule.ended[step]:
            policy.end_request(str(request))
        tokens = schedule.tokens(step)
        replay_step(policy, cache, tokens, schedule.ids(routed, step), flags=flags)
        yield tokens


def replay_step(
    policy: Policy,
    cache: ExpertCache,
    tokens: StepTokens,
    ids: npt.NDArray[np.int32],
    before_layer: Callable[[int], object] | None = None,
    *,
    flags: int = PLAN_INSTANT,
) -> None:
    """One step, ids ``[layers, tokens, top_k]``, as serving makes it.

    Calls that do not fit at once run in waves, and the policy catches up at the first miss.
    ``before_layer`` is called with each layer before it is planned.
    """
    votes = np.zeros(cache.shape.num_experts, np.float32)
    policy.begin_step(tokens)
    for layer, layer_ids in enumerate(ids):
        count_votes(layer_ids, tokens.weights, votes)
        policy.observe(layer, layer_ids, votes)
        if before_layer is not None:
            before_layer(layer)
        if cache.plan(layer, layer_ids, flags):
            _catch_up(cache, policy)
            cache.finish()
            continue
        for _ in cache.waves(layer, layer_ids, flags):
            _catch_up(cache, policy)
    policy.end_step()


def _catch_up(cache: ExpertCache, policy: Policy) -> None:
    if cache.outcome.num_misses:
        policy.catch_up()
