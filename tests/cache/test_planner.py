"""The C++ planner behind ExpertCache, against a plain reference and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.examples import examples
from tests.reference_planner import LOADING, RESIDENT, ReferencePlanner
from vllm_moe_offload.cache.planner import (
    COUNTER_NAMES,
    MISS_AWAIT,
    MISS_READ,
    ORDER_RECENCY,
    PLAN_INSTANT,
    PLAN_TRANSIENT,
    PLAN_UNPINNED,
    SCOPE_PER_LAYER,
    CacheShape,
    ExpertCache,
    PlannerRules,
)
from vllm_moe_offload.native import NO_EXPERT, NativeError

SCORED = PlannerRules(admission=True)


def ids(*experts: int) -> np.ndarray:
    return np.array(experts, np.int32)


def serve(cache: ExpertCache, layer: int, *experts: int, flags: int = 0) -> tuple[int, int]:
    """Plans, completes the reads, finishes; returns hits and misses of the call."""
    assert cache.plan(layer, ids(*experts), flags)
    counted = cache.outcome.num_hits, cache.outcome.num_misses
    _, rows, kinds = cache.misses
    for row, kind in zip(rows.copy(), kinds.copy(), strict=True):
        if kind in (MISS_READ, MISS_AWAIT) and not flags & PLAN_INSTANT:
            cache.complete(int(row), True)
    cache.finish()
    return counted


SIZES = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(0, 19), st.integers(0, 4))
"""Layers, experts, slots, staging slots."""


class PlannerMachine(RuleBasedStateMachine):
    """Random commands to the core and to the reference; they must agree on everything."""

    @initialize(sizes=SIZES, switches=st.tuples(*[st.booleans()] * 4))
    def build(self, sizes: tuple[int, ...], switches: tuple[bool, ...]) -> None:
        layers, experts, slots, staging = sizes
        recency, per_layer, admission, unbounded = switches
        if recency:
            admission = False
        rules = PlannerRules(int(recency), int(per_layer), admission)
        shape = CacheShape(layers, experts, slots, staging)
        self.cache = ExpertCache(shape, rules, unbounded_staging=unbounded)
        self.reference = ReferencePlanner(
            layers,
            experts,
            slots,
            experts if unbounded else staging,
            recency=recency,
            per_layer=per_layer,
            admission=admission,
        )
        self.shape = self.cache.shape
        self.prefetches = not recency and not per_layer
        self.pinned: dict[tuple[int, int], int] = {}
        self.in_flight: dict[int, tuple[int, int]] = {}

    def key(self, data: st.DataObject) -> tuple[int, int]:
        return (
            data.draw(st.integers(0, self.shape.num_layers - 1)),
            data.draw(st.integers(0, self.shape.num_experts - 1)),
        )

    @rule(data=st.data(), score=st.integers(-2, 4))
    def write_score(self, data: st.DataObject, score: int) -> None:
        key = self.key(data)
        self.cache.scores[key] = score
        self.reference.scores[key] = float(score)

    @precondition(lambda self: self.reference.open is None)
    @rule(data=st.data(), transient=st.booleans(), instant=st.booleans())
    def plan(self, data: st.DataObject, transient: bool, instant: bool) -> None:
        layer, _ = self.key(data)
        expert = st.integers(NO_EXPERT, self.shape.num_experts - 1)
        needed = data.draw(st.lists(expert, min_size=1, max_size=8))
        flags = PLAN_TRANSIENT * transient + PLAN_INSTANT * instant
        before = self.observed()
        planned = self.cache.plan(layer, ids(*needed), flags)
        expected = self.reference.plan(layer, needed, transient=transient, instant=instant)
        assert planned == (expected is not None)
        if expected is None:
            assert self.observed() == before
            return
        assert self.cache.experts.tolist() == expected.experts
        assert self.cache.slots.tolist() == expected.rows
        misses = list(zip(*(part.tolist() for part in self.cache.misses), strict=True))
        assert misses == expected.misses
        assert self.cache.outcome.num_hits == expected.hits
        self.pinned = {
            (layer, expert): row
            for expert, row in zip(expected.experts, expected.rows, strict=True)
            if row >= 0
        }

    @precondition(lambda self: self.reference.open is not None)
    @rule()
    def finish(self) -> None:
        # A prefetch under way for a needed expert is dropped with the plan if still loading.
        self.cache.finish()
        self.reference.finish()
        self.pinned = {}

    @precondition(lambda self: any(slot.state == LOADING for slot in self.reference.slots))
    @rule(data=st.data(), ok=st.booleans())
    def complete(self, data: st.DataObject, ok: bool) -> None:
        loading = [r for r, slot in enumerate(self.reference.slots) if slot.state == LOADING]
        row = data.draw(st.sampled_from(loading))
        key = self.reference.slots[row].key
        self.cache.complete(row, ok)
        self.reference.complete(row, ok)
        if not ok:
            self.pinned.pop(key, None)

    @precondition(lambda self: self.prefetches)
    @rule(data=st.data(), value=st.integers(-2, 4))
    def prefetch(self, data: st.DataObject, value: int) -> None:
        key = self.key(data)
        assert self.cache.prefetch(*key, value) == self.reference.prefetch(*key, value)

    @precondition(lambda self: self.prefetches)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        queued = [
            row
            for row, slot in enumerate(self.reference.slots)
            if slot.state == LOADING and slot.prefetched and not slot.pinned
        ]
        if queued:
            row = data.draw(st.sampled_from(queued))
            self.cache.cancel_prefetch(row)
            self.reference.cancel_prefetch(row)

    def observed(self) -> tuple:
        return (self.cache.page_table.tolist(), self.cache.counters.tolist())

    @invariant()
    def agrees_with_the_reference(self) -> None:
        if not hasattr(self, "cache"):
            return
        for name in COUNTER_NAMES:
            assert self.cache.count(name) == self.reference.counters[name], name
        for layer in range(self.shape.num_layers):
            for expert in range(self.shape.num_experts):
                row = self.reference.row_of((layer, expert))
                assert self.cache.page_table[layer, expert] == row
                resident = row >= 0 and self.reference.slots[row].state == RESIDENT
                assert self.cache.is_resident(layer, expert) == resident
        stays = [slot for slot in self.reference.slots if not slot.transient]
        assert self.cache.num_resident == sum(slot.state == RESIDENT for slot in stays)
        if self.reference.open is None:
            occupied = int((self.cache.page_table >= 0).sum())
            assert occupied <= self.shape.num_slots

    @invariant()
    def no_slot_serves_two_experts(self) -> None:
        if hasattr(self, "cache"):
            rows = self.cache.page_table[self.cache.page_table >= 0]
            assert rows.size == np.unique(rows).size
            assert rows.size == 0 or rows.max() < self.shape.num_pool_slots

    @invariant()
    def pinned_experts_never_move(self) -> None:
        if hasattr(self, "cache"):
            for key, row in self.pinned.items():
                assert self.cache.page_table[key] == row

    @invariant()
    def experts_in_flight_stay_until_their_read_ends(self) -> None:
        if not hasattr(self, "cache"):
            return
        # Whatever was loading and left its row did so by complete, cancel or finish, whose
        # effect the reference shows; the core must not have moved it elsewhere.
        for row, slot in enumerate(self.reference.slots):
            if slot.state == LOADING:
                assert self.cache.page_table[slot.key] == row
                assert not self.cache.is_resident(*slot.key)


TestPlanner = PlannerMachine.TestCase
TestPlanner.settings = settings(
    max_examples=examples(150),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


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


def test_without_a_free_row_the_least_valuable_makes_room_at_once() -> None:
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
    row = cache.prefetch(0, 3, 1.0)
    assert row >= 0
    assert cache.prefetch(0, 3, 1.0) == -1
    assert cache.plan(0, ids(3))
    experts, rows, kinds = cache.misses
    assert (experts.tolist(), rows.tolist(), kinds.tolist()) == ([3], [row], [MISS_AWAIT])
    cache.complete(row, True)
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
    row = cache.prefetch(0, 2, 3)
    assert row >= 0
    assert not cache.is_resident(0, 0)
    cache.complete(row, True)
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


def test_remap_gives_rows_and_pads_with_a_needed_one() -> None:
    cache = ExpertCache(CacheShape(1, 4, 4 - 1, 1), SCORED)
    needed = np.array([[2, 1], [1, 2], [9, 9]], np.int64)
    assert cache.plan(0, needed[:2])
    rows = np.full_like(needed, -1)
    cache.remap(0, needed, rows, num_ids=4)
    by_expert = dict(zip(cache.experts.tolist(), cache.slots.tolist(), strict=True))
    assert rows[:2].tolist() == [[by_expert[2], by_expert[1]], [by_expert[1], by_expert[2]]]
    assert rows[2].tolist() == [by_expert[2]] * 2


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("num_experts", [4, 400], ids=["marked", "sorted"])
def test_an_id_of_no_expert_needs_nothing(num_experts: int, dtype: type) -> None:
    cache = ExpertCache(CacheShape(1, num_experts, 3, 1), SCORED)
    needed = np.array([[-1, -1], [2, -1], [1, 2], [7, 7]], dtype)
    assert cache.plan(0, needed[:3])
    assert cache.experts.tolist() == [1, 2]
    assert (cache.outcome.num_experts, cache.outcome.num_misses) == (2, 2)
    rows = np.full_like(needed, 9)
    cache.remap(0, needed, rows, num_ids=6)
    one, two = cache.slots.tolist()
    assert rows.tolist() == [[two, two], [two, two], [one, two], [two, two]]


def test_a_call_of_no_expert_touches_no_record() -> None:
    cache = ExpertCache(CacheShape(1, 4, 2, 2), SCORED)
    serve(cache, 0, 3)
    before = cache.page_table.copy(), cache.last_use.copy(), cache.count("hits")
    assert serve(cache, 0, -1, -1) == (0, 0)
    assert cache.experts.size == cache.slots.size == cache.misses[0].size == 0
    np.testing.assert_array_equal(cache.page_table, before[0])
    np.testing.assert_array_equal(cache.last_use, before[1])
    assert cache.count("hits") == before[2]
    rows = np.full(3, 9, np.int32)
    cache.remap(0, ids(-1, -1, 5), rows, num_ids=2)
    assert rows.tolist() == [0, 0, 0]


@pytest.mark.parametrize("wrong", [-2, 4, 2**40, -(2**40)])
def test_other_ids_that_are_no_expert_are_errors(wrong: int) -> None:
    cache = ExpertCache(CacheShape(1, 4, 2, 2), SCORED)
    with pytest.raises(NativeError, match=rf"id {wrong} at position 1 is outside \[0, 4\)"):
        cache.plan(0, np.array([-1, wrong], np.int64))
    assert cache.plan(0, ids(1))
    with pytest.raises(NativeError, match=rf"expert {wrong} of layer 0 has no slot"):
        cache.remap(0, np.array([-1, wrong], np.int64), np.zeros(2, np.int64))


def test_driving_passes_over_ids_of_no_expert() -> None:
    with_them, without = (
        ExpertCache(CacheShape(2, 4, 2), SCORED, unbounded_staging=True) for _ in range(2)
    )
    with_them.drive(0, np.array([[3, -1, 1], [-1, -1, -1]], np.int32))
    without.drive(0, np.array([[3, 1]], np.int32))
    without.drive(1, np.zeros((1, 0), np.int32))
    np.testing.assert_array_equal(with_them.page_table, without.page_table)
    np.testing.assert_array_equal(with_them.counters, without.counters)


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


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("recency", [False, True])
@pytest.mark.parametrize("distinct_scores", [3, 10_000])
def test_victims_of_a_large_cache_are_the_references(
    per_layer: bool, recency: bool, distinct_scores: int
) -> None:
    """Sizes beyond what one block of keys holds, with and without ties."""
    layers, experts, slots = 3, 150, 200
    generator = np.random.default_rng(distinct_scores)
    rules = PlannerRules(int(recency), int(per_layer), admission=not recency)
    cache = ExpertCache(CacheShape(layers, experts, slots), rules, unbounded_staging=True)
    reference = ReferencePlanner(
        layers,
        experts,
        slots,
        experts,
        recency=recency,
        per_layer=per_layer,
        admission=not recency,
    )
    for step in range(60):
        layer = step % layers
        scores = generator.integers(0, distinct_scores, (layers, experts))
        cache.scores[...] = scores
        reference.scores = dict(np.ndenumerate(scores.astype(float)))
        needed = generator.choice(experts, generator.integers(1, 40))
        cache.plan(layer, needed.astype(np.int32), PLAN_INSTANT)
        cache.finish()
        reference.plan(layer, needed.tolist(), instant=True)
        reference.finish()
        table = [[reference.row_of((row, e)) for e in range(experts)] for row in range(layers)]
        np.testing.assert_array_equal(cache.page_table, table)


@pytest.mark.parametrize("rules", [SCORED, PlannerRules(ORDER_RECENCY, SCOPE_PER_LAYER, False)])
def test_driving_layers_is_scoring_planning_and_finishing_them(rules: PlannerRules) -> None:
    driven, planned = (
        ExpertCache(CacheShape(3, 12, 10), rules, unbounded_staging=True) for _ in range(2)
    )
    generator = np.random.default_rng(0)
    decay = np.float32(0.9)
    for _ in range(30):
        step_ids = generator.integers(0, 12, (3, 2, 3)).astype(np.int32)
        gain = generator.random((3, 12), np.float32)
        driven.drive(0, step_ids[:1], gain[:1], decay)
        driven.drive(1, step_ids[1:], gain[1:], decay)
        for layer in range(3):
            planned.scores[layer] *= decay
            planned.scores[layer] += gain[layer]
            planned.plan(layer, step_ids[layer], PLAN_INSTANT)
            planned.finish()
        np.testing.assert_array_equal(driven.scores, planned.scores)
        np.testing.assert_array_equal(driven.page_table, planned.page_table)
        np.testing.assert_array_equal(driven.counters, planned.counters)
    before = driven.scores.copy()
    driven.drive(0, step_ids)
    np.testing.assert_array_equal(driven.scores, before)


def test_driving_says_what_is_wrong() -> None:
    cache = ExpertCache(CacheShape(2, 4, 2), SCORED, unbounded_staging=True)
    with pytest.raises(NativeError, match=r"layers \[1, 3\) are not all in \[0, 2\)"):
        cache.drive(1, np.zeros((2, 1), np.int32))
    with pytest.raises(NativeError, match=r"expert id 4 .*outside \[0, 4\)"):
        cache.drive(0, np.full((2, 1), 4, np.int32))
    bounded = ExpertCache(CacheShape(2, 4, 2, 1), SCORED)
    with pytest.raises(
        NativeError, match="drive needs a staging slot for every expert of a layer, got 1"
    ):
        bounded.drive(0, np.zeros((2, 1), np.int32))
