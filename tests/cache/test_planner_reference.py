"""The C++ planner against a plain reference, which shares no code with it."""

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
    PLAN_INSTANT,
    PLAN_TRANSIENT,
    CacheShape,
    ExpertCache,
    PlannerRules,
)
from vllm_moe_offload.native import NO_EXPERT

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
        planned = self.cache.plan(layer, np.array(needed, np.int32), flags)
        expected = self.reference.plan(layer, needed, transient=transient, instant=instant)
        assert planned == (expected is not None)
        if expected is None:
            assert self.observed() == before
            return
        assert self.cache.experts.tolist() == expected.experts
        assert self.cache.slots.tolist() == expected.indices
        misses = list(zip(*(part.tolist() for part in self.cache.misses), strict=True))
        assert misses == expected.misses
        assert self.cache.outcome.num_hits == expected.hits
        self.pinned = {
            (layer, expert): index
            for expert, index in zip(expected.experts, expected.indices, strict=True)
            if index >= 0
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
        index = data.draw(st.sampled_from(loading))
        key = self.reference.slots[index].key
        self.cache.complete(index, ok)
        self.reference.complete(index, ok)
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
            index
            for index, slot in enumerate(self.reference.slots)
            if slot.state == LOADING and slot.prefetched and not slot.pinned
        ]
        if queued:
            index = data.draw(st.sampled_from(queued))
            self.cache.cancel_prefetch(index)
            self.reference.cancel_prefetch(index)

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
                index = self.reference.index_of((layer, expert))
                assert self.cache.page_table[layer, expert] == index
                resident = index >= 0 and self.reference.slots[index].state == RESIDENT
                assert self.cache.is_resident(layer, expert) == resident
        stays = [slot for slot in self.reference.slots if not slot.transient]
        assert self.cache.num_resident == sum(slot.state == RESIDENT for slot in stays)
        if self.reference.open is None:
            occupied = int((self.cache.page_table >= 0).sum())
            assert occupied <= self.shape.num_slots

    @invariant()
    def no_slot_serves_two_experts(self) -> None:
        if hasattr(self, "cache"):
            indices = self.cache.page_table[self.cache.page_table >= 0]
            assert indices.size == np.unique(indices).size
            assert indices.size == 0 or indices.max() < self.shape.num_pool_slots

    @invariant()
    def pinned_experts_never_move(self) -> None:
        if hasattr(self, "cache"):
            for key, index in self.pinned.items():
                assert self.cache.page_table[key] == index

    @invariant()
    def experts_in_flight_stay_until_their_read_ends(self) -> None:
        if not hasattr(self, "cache"):
            return
        # Whatever was loading and left its slot did so by complete, cancel or finish, whose
        # effect the reference shows; the core must not have moved it elsewhere.
        for index, slot in enumerate(self.reference.slots):
            if slot.state == LOADING:
                assert self.cache.page_table[slot.key] == index
                assert not self.cache.is_resident(*slot.key)


TestPlanner = PlannerMachine.TestCase
TestPlanner.settings = settings(
    max_examples=examples(150),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


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
        table = [[reference.index_of((at, e)) for e in range(experts)] for at in range(layers)]
        np.testing.assert_array_equal(cache.page_table, table)
