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

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.cache.planner import (
    PLAN_INSTANT,
    PLAN_UNPINNED,
    SCOPE_PER_LAYER,
    CacheShape,
    ExpertCache,
)
from vllm_moe_offload.forecast.coactivation import CrossLayerPredictor
from vllm_moe_offload.native import check, core
from vllm_moe_offload.policy import Policy, make_policy
from vllm_moe_offload.policy.belady import Belady
from vllm_moe_offload.policy.shadow import bind_policy
from vllm_moe_offload.replay.schedule import (
    ReplayError,
    Schedule,
    decode_schedule,
    recorded_schedule,
)
from vllm_moe_offload.step import StepTokens
from vllm_moe_offload.trace.routing import RoutingTrace

Progress = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What one policy did at one capacity and concurrency.

    ``prefetch_coverage`` is the share of misses that the cross-layer predictor named at least
    one layer call ahead, ``prefetch_waste`` the share of the experts it named that were then
    not used; None for policies that do not predict.
    """

    policy: str
    capacity: float
    concurrency: int | None
    hit_rate: float
    misses_per_token: float
    hits: int
    misses: int
    tokens: int
    prefetch_coverage: float | None = None
    prefetch_waste: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: without the figures that do not apply."""
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
    prefetch_depth: int = 0,
    progress: Progress | None = None,
    timeline: list[tuple[int, int]] | None = None,
) -> ReplayResult:
    """Replays the first ``num_requests`` requests by the rules of the module.

    ``prefetch_depth`` above 0 also scores the cross-layer predictor that many layers ahead.
    ``progress`` is called with the number of tokens done since its last call. ``timeline``
    receives hits and misses so far after every step.

    Raises:
        ReplayError, ValueError: a parameter is out of range; says which and why.
    """
    shape = (trace.num_layers, trace.num_experts)
    slots = capacity_slots(capacity, *shape)
    chosen = make_policy(policy, *shape)
    cache = ExpertCache(CacheShape(*shape, slots), chosen.rules, unbounded_staging=True)
    schedule = decode_schedule(trace, concurrency, num_requests)
    predictor = CrossLayerPredictor(*shape, depth=prefetch_depth) if prefetch_depth else None
    forecast = _Forecast(predictor, cache) if predictor is not None else None
    counts = _run(
        trace, schedule, chosen, cache, forecast, progress=progress, timeline=timeline
    )
    return _result(policy, capacity, concurrency, counts)


def replay_recorded(
    trace: RoutingTrace,
    policy: str,
    *,
    capacity: float | None = None,
    progress: Progress | None = None,
) -> ReplayResult:
    """Replays the server's own steps with its slots (or those of ``capacity``)."""
    schedule = recorded_schedule(trace)
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
    share = slots / (shape[0] * shape[1])
    return _result(
        policy, share, None, _run(trace, schedule, chosen, cache, None, progress=progress)
    )


@dataclass(frozen=True, slots=True)
class _Counts:
    hits: int
    misses: int
    tokens: int
    forecast: _Forecast | None


def _result(
    policy: str, capacity: float, concurrency: int | None, counts: _Counts
) -> ReplayResult:
    forecast = counts.forecast
    return ReplayResult(
        policy=policy,
        capacity=capacity,
        concurrency=concurrency,
        hit_rate=counts.hits / max(counts.hits + counts.misses, 1),
        misses_per_token=counts.misses / max(counts.tokens, 1),
        hits=counts.hits,
        misses=counts.misses,
        tokens=counts.tokens,
        prefetch_coverage=None if forecast is None else forecast.coverage,
        prefetch_waste=None if forecast is None else forecast.waste,
    )


def _run(
    trace: RoutingTrace,
    schedule: Schedule,
    policy: Policy,
    cache: ExpertCache,
    forecast: _Forecast | None,
    *,
    progress: Progress | None,
    timeline: list[tuple[int, int]] | None = None,
) -> _Counts:
    bind_policy(policy, cache)
    flags = PLAN_INSTANT
    if isinstance(policy, Belady):
        policy.foresee(schedule.offsets, _routing(trace, schedule))
        flags |= PLAN_UNPINNED
    votes = np.zeros(trace.num_experts, np.float32)
    for step in range(schedule.num_steps):
        for request in schedule.ended[step]:
            policy.end_request(str(request))
            if forecast is not None:
                forecast.end_request(str(request))
        tokens = schedule.tokens(step)
        ids = _step_ids(trace, schedule, step)
        policy.begin_step(tokens)
        if forecast is not None:
            forecast.begin_step(tokens)
        for layer in range(trace.num_layers):
            layer_ids = ids[layer]
            _count_votes(layer_ids, tokens, trace.num_experts, votes)
            policy.observe(layer, layer_ids, votes)
            if forecast is not None:
                forecast.observe(layer, layer_ids)
            plan_waves(cache, policy, layer, layer_ids, flags)
        policy.end_step()
        if forecast is not None:
            forecast.end_step()
        if timeline is not None:
            timeline.append((cache.count("hits"), cache.count("misses")))
        if progress is not None:
            progress(tokens.request_of_token.size)
    return _Counts(
        cache.count("hits"), cache.count("misses"), int(schedule.row_token.size), forecast
    )


def plan_waves(
    cache: ExpertCache,
    policy: Policy,
    layer: int,
    ids: npt.NDArray[np.integer[Any]],
    flags: int,
) -> None:
    """Plans and finishes one layer call, in waves where its experts do not fit at once.

    Waves as serving makes them: resident experts first, as many as the pool has rows. And as
    in serving, the policy catches up at a step's first miss.

    Raises:
        ReplayError: the cache has no rows at all.
    """
    if cache.plan(layer, ids, flags):
        _finish(cache, policy)
        return
    needed = np.unique(ids).astype(np.int32)
    resident = cache.page_table[layer, needed] >= 0
    order = np.concatenate([needed[resident], needed[~resident]])
    size = cache.shape.num_slots
    if cache.rules.scope == SCOPE_PER_LAYER:
        size //= cache.shape.num_layers
    size += cache.shape.num_staging_slots
    for begin in range(0, order.size, max(size, 1)):
        wave = np.ascontiguousarray(order[begin : begin + max(size, 1)])
        if not cache.plan(layer, wave, flags):
            raise ReplayError(
                f"{wave.size} experts of layer {layer} do not fit in {cache.shape}"
            )
        _finish(cache, policy)


def _finish(cache: ExpertCache, policy: Policy) -> None:
    if cache.outcome.num_misses:
        policy.catch_up()
    cache.finish()


class _Forecast:
    """Scores the cross-layer predictor without touching the cache.

    One layer ahead and up, an expert that is not resident counts as named if at least one
    token is expected to use it; budgets and transfer times are serving's business.
    """

    THRESHOLD = 0.5

    def __init__(self, predictor: CrossLayerPredictor, cache: ExpertCache) -> None:
        self._predictor = predictor
        self._cache = cache
        shape = cache.shape
        self._named = np.zeros((shape.num_layers, shape.num_experts), np.bool_)
        self._issued = self._useful = self._misses = 0

    def begin_step(self, tokens: StepTokens) -> None:
        self._predictor.begin_step(tokens)

    def observe(self, layer: int, ids: npt.NDArray[np.int32]) -> None:
        absent = self._cache.page_table[layer] < 0
        needed = np.zeros(absent.size, np.bool_)
        needed[ids.reshape(-1)] = True
        missing = needed & absent
        named = self._named[layer] & absent
        self._misses += int(np.count_nonzero(missing))
        self._issued += int(np.count_nonzero(named))
        self._useful += int(np.count_nonzero(named & missing))
        self._named[layer] = False
        self._predictor.observe(layer, ids)
        for ahead in range(1, self._predictor.depth + 1):
            likely = self._predictor.probabilities(layer, ahead)
            if likely is None:
                break
            self._named[layer + ahead] |= likely >= self.THRESHOLD

    def end_step(self) -> None:
        self._predictor.end_step()

    def end_request(self, request: str) -> None:
        self._predictor.end_request(request)

    @property
    def coverage(self) -> float:
        return self._useful / max(self._misses, 1)

    @property
    def waste(self) -> float:
        return 1.0 - self._useful / max(self._issued, 1)


def _count_votes(
    ids: npt.NDArray[np.int32],
    tokens: StepTokens,
    num_experts: int,
    votes: npt.NDArray[np.float32],
) -> None:
    """Sums the weights of the rows per expert, in the order and precision of serving."""
    check(
        core.vmo_expert_histogram(
            ids.ctypes.data,
            ids.shape[0],
            ids.shape[1],
            ids.itemsize,
            tokens.weights.ctypes.data,
            num_experts,
            votes.ctypes.data,
        )
    )


def _routing(trace: RoutingTrace, schedule: Schedule) -> npt.NDArray[np.integer[Any]]:
    """Ids ``[tokens, layers, top_k]`` of the whole schedule."""
    if trace.schedule is None or not trace.schedule.recomputed_ids.size:
        return np.asarray(trace.ids[schedule.row_token])
    both = np.concatenate([trace.ids, trace.schedule.recomputed_ids])
    return np.asarray(both[schedule.row_token])


def _step_ids(trace: RoutingTrace, schedule: Schedule, step: int) -> npt.NDArray[np.int32]:
    """Ids ``[layers, tokens, top_k]`` of one step."""
    tokens = schedule.row_token[schedule.offsets[step] : schedule.offsets[step + 1]]
    if trace.schedule is not None:
        own = trace.ids.shape[0]
        again = tokens >= own
        if again.any():
            ids = trace.ids[np.where(again, 0, tokens)]
            ids[again] = trace.schedule.recomputed_ids[tokens[again] - own]
            return np.ascontiguousarray(ids.transpose(1, 0, 2), dtype=np.int32)
    return np.ascontiguousarray(trace.ids[tokens].transpose(1, 0, 2), dtype=np.int32)
