"""The C++ planner behind ExpertCache, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_moe_offload.cache.planner import (
    MISS_AWAIT,
    MISS_READ,
    ORDER_RECENCY,
    PLAN_INSTANT,
    PLAN_TRANSIENT,
    PLAN_UNPINNED,
    SCOPE_GLOBAL,
    SCOPE_PER_LAYER,
    CacheShape,
    ExpertCache,
    PlannerRules,
)
from vllm_moe_offload.native import LayerCall, NativeError, check

SCORED = PlannerRules(admission=True)


def ids(*experts: int) -> np.ndarray:
    return np.array(experts, np.int32)


def slots_of(cache: ExpertCache, layer: int, needed: np.ndarray, num_tokens: int) -> np.ndarray:
    """Plans ``needed`` ``[tokens or more, top_k]`` as serving does; the slot of every id."""
    slots = np.full_like(needed, -1)
    call = LayerCall(
        ids=needed.ctypes.data,
        slots=slots.ctypes.data,
        num_tokens=num_tokens,
        num_padded_tokens=len(needed),
        layer=layer,
        id_bytes=needed.itemsize,
        top_k=needed.shape[1],
    )
    assert check(cache.server_of(call)()) == 1
    return slots


def serve(cache: ExpertCache, layer: int, *experts: int, flags: int = 0) -> tuple[int, int]:
    """Plans, completes the reads, finishes; returns hits and misses of the call."""
    assert cache.plan(layer, ids(*experts), flags)
    counted = cache.outcome.num_hits, cache.outcome.num_misses
    _, slots, kinds = cache.misses
    for slot, kind in zip(slots.copy(), kinds.copy(), strict=True):
        if kind in (MISS_READ, MISS_AWAIT) and not flags & PLAN_INSTANT:
            cache.complete(int(slot), True)
    cache.finish()
    return counted


def test_hits_are_counted_before_any_change() -> None:
    cache = ExpertCache(CacheShape(1, 4, 2, 4), PlannerRules(admission=False))
    assert serve(cache, 0, 0, 1) == (0, 2)
    assert serve(cache, 0, 1, 2, 3, 3) == (1, 2)
    assert (cache.count("hits"), cache.count("misses")) == (1, 4)


def test_repeats_count_once() -> None:
    cache = ExpertCache(CacheShape(1, 4, 4, 0), SCORED)
    assert serve(cache, 0, 2, 2, 2) == (0, 1)


def test_admission_sends_a_worthless_miss_to_staging() -> None:
    cache = ExpertCache(CacheShape(1, 4, 1, 1), SCORED)
    cache.scores[0] = [3, 1, 5, 3]
    serve(cache, 0, 0)
    serve(cache, 0, 1)
    assert cache.page_table.tolist() == [[0, -1, -1, -1]]
    assert (cache.count("bypasses"), cache.count("evictions")) == (1, 0)
    serve(cache, 0, 3)  # an equal score does not replace
    assert cache.is_resident(0, 0)
    serve(cache, 0, 2)
    assert cache.page_table.tolist() == [[-1, -1, 1, -1]]


def test_who_stays_is_decided_by_the_scores_when_the_call_is_done() -> None:
    cache = ExpertCache(CacheShape(1, 4, 2, 1), SCORED)
    cache.scores[0] = [1, 2, 0, 0]
    serve(cache, 0, 0, 1)
    assert cache.plan(0, ids(2))
    assert (cache.page_table[0] >= 0).tolist() == [True, True, True, False]
    cache.complete(int(cache.slots[0]), True)
    cache.scores[0] = [1, 0, 3, 0]  # what a policy found out while 2 was read
    cache.finish()
    assert (cache.page_table[0] >= 0).tolist() == [True, False, True, False]


def test_hits_of_a_call_never_make_room_for_its_misses() -> None:
    cache = ExpertCache(CacheShape(1, 4, 1, 2), SCORED)
    cache.scores[0] = [1, 5, 0, 0]
    serve(cache, 0, 0)
    serve(cache, 0, 0, 1)
    assert cache.is_resident(0, 0)
    assert cache.count("bypasses") == 1


def test_without_a_free_slot_the_least_valuable_makes_room_at_once() -> None:
    cache = ExpertCache(CacheShape(1, 4, 2, 0), SCORED)
    cache.scores[0] = [1, 2, 0, 0]
    serve(cache, 0, 0, 1)
    serve(cache, 0, 3)  # worth less than both, and the next to go
    assert (cache.page_table[0] >= 0).tolist() == [False, True, False, True]
    assert cache.count("evictions") == 1


def test_least_valuable_is_evicted_first() -> None:
    cache = ExpertCache(CacheShape(2, 3, 3, 3), SCORED)
    cache.scores[...] = [[2, 1, 3], [9, 9, 9]]
    serve(cache, 0, 0, 1, 2)
    serve(cache, 1, 0)
    assert (cache.page_table >= 0).tolist() == [[True, False, True], [True, False, False]]


def test_ties_go_by_layer_then_expert() -> None:
    cache = ExpertCache(CacheShape(2, 2, 3, 2), PlannerRules(admission=False))
    serve(cache, 1, 0)
    serve(cache, 0, 1)
    serve(cache, 0, 0)
    serve(cache, 1, 1)
    assert (cache.page_table >= 0).tolist() == [[False, True], [True, True]]


def test_a_plan_that_does_not_fit_changes_nothing() -> None:
    cache = ExpertCache(CacheShape(1, 6, 2, 1), SCORED)
    serve(cache, 0, 0, 1)
    before = cache.page_table.copy(), cache.counters.copy()
    assert not cache.plan(0, ids(1, 2, 3, 4))
    np.testing.assert_array_equal(cache.page_table, before[0])
    np.testing.assert_array_equal(cache.counters, before[1])
    assert serve(cache, 0, 1, 2, 3) == (1, 2)


def test_transient_calls_leave_no_trace() -> None:
    cache = ExpertCache(CacheShape(1, 6, 2, 3), SCORED)
    serve(cache, 0, 0, 1)
    before = cache.page_table.copy(), cache.counters.copy(), cache.last_use.copy()
    serve(cache, 0, 1, 2, 3, 4, flags=PLAN_TRANSIENT)
    np.testing.assert_array_equal(cache.page_table, before[0])
    np.testing.assert_array_equal(cache.counters, before[1])
    np.testing.assert_array_equal(cache.last_use, before[2])


def test_a_demand_for_an_expert_in_flight_waits_for_its_prefetch() -> None:
    """The reference implementation fetched it a second time."""
    cache = ExpertCache(CacheShape(1, 4, 2, 2), SCORED)
    slot = cache.prefetch(0, 3, 1.0)
    assert slot >= 0
    assert cache.prefetch(0, 3, 1.0) == -1
    assert cache.plan(0, ids(3))
    experts, slots, kinds = cache.misses
    assert (experts.tolist(), slots.tolist(), kinds.tolist()) == ([3], [slot], [MISS_AWAIT])
    cache.complete(slot, True)
    cache.finish()
    assert cache.is_resident(0, 3)
    assert cache.count("prefetch_late") == 1
    assert cache.count("misses") == 1


def test_a_useful_prefetch_is_a_hit_and_counts_once() -> None:
    cache = ExpertCache(CacheShape(1, 4, 2, 2), SCORED)
    cache.complete(cache.prefetch(0, 3, 1.0), True)
    assert serve(cache, 0, 3) == (1, 0)
    assert serve(cache, 0, 3) == (1, 0)
    assert cache.count("prefetch_useful") == 1


def test_prefetch_never_evicts_what_is_worth_more() -> None:
    cache = ExpertCache(CacheShape(1, 3, 1, 1), SCORED)
    cache.scores[0] = [2, 0, 0]
    serve(cache, 0, 0)
    assert cache.prefetch(0, 1, 2) == -1
    slot = cache.prefetch(0, 2, 3)
    assert slot >= 0
    assert not cache.is_resident(0, 0)
    cache.complete(slot, True)
    serve(cache, 0, 1)  # its layer was served without it: it may go
    cache.scores[0, 1] = 4
    serve(cache, 0, 1)
    assert cache.count("prefetch_wasted") == 1


def test_what_is_expected_stays_until_its_layer_was_served() -> None:
    cache = ExpertCache(CacheShape(2, 4, 2, 4), SCORED)
    cache.scores[...] = [[9, 9, 9, 9], [1, 0, 0, 0]]
    cache.complete(cache.prefetch(1, 0, 5.0), True)
    cache.complete(cache.prefetch(1, 1, 5.0), True)
    serve(cache, 0, 0, 1)  # worth more, and yet in staging
    assert cache.is_resident(1, 0)
    assert cache.is_resident(1, 1)
    assert cache.prefetch(0, 3, 10.0) == -1
    assert serve(cache, 1, 0) == (1, 0)
    serve(cache, 0, 0, 1)
    assert not cache.is_resident(1, 0)
    assert not cache.is_resident(1, 1)


def test_residents_can_be_expected_too() -> None:
    cache = ExpertCache(CacheShape(2, 4, 2, 4), SCORED)
    serve(cache, 1, 0, 1)
    cache.scores[0] = 9
    assert cache.prefetch(1, 1, 5.0) == -1
    serve(cache, 0, 0, 1)
    assert cache.is_resident(1, 1)
    assert not cache.is_resident(1, 0)
    assert cache.count("prefetch_issued") == 0


def test_a_need_outweighs_expectations() -> None:
    cache = ExpertCache(CacheShape(2, 4, 2, 0), SCORED)
    cache.complete(cache.prefetch(1, 0, 5.0), True)
    cache.complete(cache.prefetch(1, 1, 5.0), True)
    assert serve(cache, 0, 0, 1) == (0, 2)
    assert cache.count("prefetch_wasted") == 2


def test_per_layer_scope_keeps_layers_apart() -> None:
    rules = PlannerRules(ORDER_RECENCY, SCOPE_PER_LAYER, admission=False)
    cache = ExpertCache(CacheShape(2, 4, 5, 0), rules, unbounded_staging=True)
    for expert in range(4):
        serve(cache, 0, expert, flags=PLAN_INSTANT)
    assert (cache.page_table >= 0).sum(axis=1).tolist() == [2, 0]
    assert serve(cache, 0, 2, 3, flags=PLAN_INSTANT) == (2, 0)


def test_everything_fits_in_logical_order() -> None:
    cache = ExpertCache(CacheShape(2, 3, 6, 0), SCORED)
    serve(cache, 1, 2, 0)
    assert cache.page_table.tolist() == [[-1, -1, -1], [3, -1, 5]]


def test_unpinned_plans_may_evict_their_own_need() -> None:
    cache = ExpertCache(CacheShape(1, 3, 1, 0), SCORED, unbounded_staging=True)
    cache.scores[0] = [1, 2, 0]
    serve(cache, 0, 0, flags=PLAN_INSTANT)
    assert serve(cache, 0, 0, 1, flags=PLAN_INSTANT | PLAN_UNPINNED) == (1, 1)
    assert cache.is_resident(0, 1)


def test_remap_gives_slots_and_pads_with_a_needed_one() -> None:
    cache = ExpertCache(CacheShape(1, 4, 4 - 1, 1), SCORED)
    needed = np.array([[2, 1], [1, 2], [9, 9]], np.int64)
    slots = slots_of(cache, 0, needed, num_tokens=2)
    by_expert = dict(zip(cache.experts.tolist(), cache.slots.tolist(), strict=True))
    assert slots[:2].tolist() == [[by_expert[2], by_expert[1]], [by_expert[1], by_expert[2]]]
    assert slots[2].tolist() == [by_expert[2]] * 2


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("num_experts", [4, 400], ids=["marked", "sorted"])
def test_an_id_of_no_expert_needs_nothing(num_experts: int, dtype: type) -> None:
    cache = ExpertCache(CacheShape(1, num_experts, 3, 1), SCORED)
    needed = np.array([[-1, -1], [2, -1], [1, 2], [7, 7]], dtype)
    slots = slots_of(cache, 0, needed, num_tokens=3)
    assert cache.experts.tolist() == [1, 2]
    assert (cache.outcome.num_experts, cache.outcome.num_misses) == (2, 2)
    one, two = cache.slots.tolist()
    assert slots.tolist() == [[two, two], [two, two], [one, two], [two, two]]


def test_a_call_of_no_expert_touches_no_record() -> None:
    cache = ExpertCache(CacheShape(1, 4, 2, 2), SCORED)
    serve(cache, 0, 3)
    before = cache.page_table.copy(), cache.last_use.copy(), cache.count("hits")
    assert serve(cache, 0, -1, -1) == (0, 0)
    assert cache.experts.size == cache.slots.size == cache.misses[0].size == 0
    np.testing.assert_array_equal(cache.page_table, before[0])
    np.testing.assert_array_equal(cache.last_use, before[1])
    assert cache.count("hits") == before[2]
    slots = slots_of(cache, 0, np.array([[-1], [-1], [5]], np.int32), num_tokens=2)
    assert slots.tolist() == [[0], [0], [0]]


@pytest.mark.parametrize("wrong", [-2, 4, 2**40, -(2**40)])
def test_other_ids_that_are_no_expert_are_errors(wrong: int) -> None:
    cache = ExpertCache(CacheShape(1, 4, 2, 2), SCORED)
    with pytest.raises(NativeError, match=rf"id {wrong} at position 1 is outside \[0, 4\)"):
        cache.plan(0, np.array([-1, wrong], np.int64))


def test_errors_name_what_is_wrong() -> None:
    cache = ExpertCache(CacheShape(2, 4, 2, 2), SCORED)
    with pytest.raises(NativeError, match=r"expert id 4 .*outside \[0, 4\)"):
        cache.plan(0, ids(1, 4))
    with pytest.raises(NativeError, match=r"layer 2 is outside \[0, 2\)"):
        cache.plan(2, ids(1))
    cache.plan(0, ids(1))
    with pytest.raises(NativeError, match="layer 1 planned while the plan of layer 0 is open"):
        cache.plan(1, ids(1))
    with pytest.raises(NativeError, match="num_layers must be positive"):
        ExpertCache(CacheShape(0, 4, 2, 2), SCORED)
    with pytest.raises(NativeError, match="no read under way"):
        cache.complete(3, True)


def test_transient_calls_need_no_victim_where_staging_is_unbounded() -> None:
    cache = ExpertCache(CacheShape(1, 6, 1, 0), SCORED, unbounded_staging=True)
    assert cache.plan(0, ids(1, 2, 3), PLAN_TRANSIENT)
    cache.finish()
    assert cache.num_resident == 0


@pytest.mark.parametrize(
    ("scope", "sizes"), [(SCOPE_GLOBAL, [5, 2]), (SCOPE_PER_LAYER, [3, 3, 1])]
)
def test_waves_serve_everything_and_what_is_resident_first(
    scope: int, sizes: list[int]
) -> None:
    cache = ExpertCache(CacheShape(2, 8, 4, 1), PlannerRules(scope=scope, admission=False))
    for expert in (6, 7):
        cache.plan(0, ids(expert), PLAN_INSTANT)
        cache.finish()
    needed = np.array([[0, 1, -1], [7, 2, 3], [6, 4, 0]], np.int32)
    assert not cache.plan(0, needed, PLAN_INSTANT)
    waves, hits = [], []
    for _ in cache.waves(0, needed, PLAN_INSTANT):
        waves.append(cache.experts.tolist())
        hits.append(cache.outcome.num_hits)
    assert [len(wave) for wave in waves] == sizes
    assert sorted(expert for wave in waves for expert in wave) == [0, 1, 2, 3, 4, 6, 7]
    assert {6, 7} <= set(waves[0])
    assert hits[0] == 2
    assert cache.plan(1, ids(0))  # no plan is open


def test_waves_of_a_cache_without_slots_are_an_error() -> None:
    cache = ExpertCache(CacheShape(1, 4, 0, 0), SCORED)
    with pytest.raises(RuntimeError, match="1 experts of layer 0 do not fit in"):
        list(cache.waves(0, ids(1, 2)))
