"""The runtime: whatever is routed, evicted, prefetched or cancelled, slots hold the right bytes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.examples import examples
from tests.runtimes import (
    EXPERTS,
    LAYERS,
    TOP_K,
    Foresight,
    assert_slots_hold,
    decode_tokens,
    ids_of,
    run_layer,
    runtime_of,
)
from tests.stores import build, build_joined, layout_of
from vllm_moe_offload.cache.planner import PLAN_INSTANT, ExpertCache
from vllm_moe_offload.policy import make_policy
from vllm_moe_offload.runtime import OffloadRuntime
from vllm_moe_offload.step import StepTokens
from vllm_moe_offload.store import ExpertStore
from vllm_moe_offload.transfer import TransferError


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ExpertStore:
    return build(tmp_path_factory.mktemp("runtime"), layout_of(8192, 12), LAYERS, EXPERTS)


class Serving(RuleBasedStateMachine):
    """Any routing, any prediction, right or wrong, in caches of any size."""

    store: ExpertStore
    num_draft_layers = 0

    @initialize(
        slots=st.integers(TOP_K, LAYERS * EXPERTS),
        staging=st.integers(0, 3),
        mode=st.sampled_from(["trace", "lrfu"]),
    )
    def start(self, slots: int, staging: int, mode: str) -> None:
        total = self.store.num_layers * EXPERTS
        everything = slots == LAYERS * EXPERTS
        slots = total if everything else slots
        self.foresight = Foresight()
        self.runtime = runtime_of(
            self.store,
            slots,
            0 if everything else staging,
            mode,
            self.foresight,
            num_draft_layers=self.num_draft_layers,
        )
        self.position = 0

    @rule(data=st.data())
    def predict(self, data: st.DataObject) -> None:
        chance = st.sampled_from([0.0, 0.5, 0.9])
        size = LAYERS * EXPERTS
        likely = data.draw(st.lists(chance, min_size=size, max_size=size))
        self.foresight.likely = np.array(likely, np.float32).reshape(LAYERS, EXPERTS)

    @rule(data=st.data(), requests=st.integers(1, 3), length=st.integers(1, 3))
    def step(self, data: st.DataObject, requests: int, length: int) -> None:
        tokens = StepTokens.of_lengths(
            [f"r{index}" for index in range(requests)],
            np.full(requests, length),
            np.full(requests, self.position),
            np.full(requests, length > 1),
        )
        self.position += length
        self.runtime.begin_step(tokens)
        expert = st.integers(0, EXPERTS - 1)
        for layer in range(LAYERS):
            count = requests * length
            ids = data.draw(
                st.lists(
                    st.lists(expert, min_size=TOP_K, max_size=TOP_K, unique=True),
                    min_size=count,
                    max_size=count,
                )
            )
            run_layer(self.runtime, self.store, layer, torch.tensor(ids, dtype=torch.int32))

    @precondition(lambda self: self.num_draft_layers > 0)
    @rule(data=st.data(), lengths=st.lists(st.integers(1, 3), min_size=1, max_size=3))
    def draft(self, data: st.DataObject, lengths: list[int]) -> None:
        """A pass of a drafter through its layers, before a step or after it."""
        nobody = np.zeros(len(lengths), np.int64)
        names = [f"r{index}" for index in range(len(lengths))]
        tokens = StepTokens.of_lengths(names, np.array(lengths), nobody, nobody > 0)
        expert = st.integers(0, EXPERTS - 1)
        with self.runtime.draft_pass(tokens):
            for layer in range(LAYERS, LAYERS + self.num_draft_layers):
                count = sum(lengths)
                pairs = st.lists(expert, min_size=TOP_K, max_size=TOP_K, unique=True)
                ids = data.draw(st.lists(pairs, min_size=count, max_size=count))
                run_layer(self.runtime, self.store, layer, torch.tensor(ids, dtype=torch.int32))

    @rule(layer=st.integers(0, LAYERS - 1), expert=st.integers(0, EXPERTS - 1))
    def warm_up(self, layer: int, expert: int) -> None:
        """A call without a request behind it."""
        ids = torch.tensor([[expert, (expert + 1) % EXPERTS]], dtype=torch.int32)
        run_layer(self.runtime, self.store, layer, ids)

    @rule(request=st.integers(0, 2))
    def end(self, request: int) -> None:
        self.runtime.end_request(f"r{request}")

    @precondition(lambda self: hasattr(self, "runtime"))
    @invariant()
    def every_slot_has_one_expert_and_its_bytes(self) -> None:
        cache = self.runtime.cache
        slots = cache.page_table[cache.page_table >= 0]
        assert len(set(slots.tolist())) == slots.size
        for layer, expert in np.argwhere(cache.page_table >= 0).tolist():
            if cache.is_resident(layer, expert):
                ids = np.array([expert])
                slot = np.array([cache.page_table[layer, expert]])
                assert_slots_hold(self.runtime, self.store, layer, ids, slot)

    def teardown(self) -> None:
        if hasattr(self, "runtime"):
            self.runtime.close()


@pytest.fixture(scope="module")
def store_with_drafter(tmp_path_factory) -> ExpertStore:
    directory = tmp_path_factory.mktemp("drafted")
    return build_joined(directory, layout_of(8192, 12), (LAYERS, 2), EXPERTS)


@pytest.mark.parametrize("num_draft_layers", [0, 2])
def test_any_serving(store, store_with_drafter, num_draft_layers: int) -> None:
    attributes = {
        "store": store_with_drafter if num_draft_layers else store,
        "num_draft_layers": num_draft_layers,
    }
    machine = type("ServingFromStore", (Serving,), attributes)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples(40),
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


# ---- drafters ------------------------------------------------------------------------------


def a_pass(runtime: OffloadRuntime, store: ExpertStore, *pairs: tuple[int, int]) -> None:
    with runtime.draft_pass(decode_tokens(["a"])):
        for layer, pair in enumerate(pairs, LAYERS):
            run_layer(runtime, store, layer, ids_of(*pair))


@pytest.mark.parametrize("mode", ["trace", "lrfu", "lru"])
def test_a_drafters_experts_are_cached_and_counted_with_the_models(
    store_with_drafter, mode: str
) -> None:
    store = store_with_drafter
    runtime = runtime_of(store, 12, 2, mode, num_draft_layers=2)
    for _ in range(6):
        one_step(runtime, store, [(0, 1)] * LAYERS)
        a_pass(runtime, store, (2, 3), (4, 5))
        a_pass(runtime, store, (2, 3), (4, 5))
    counters = runtime.cache.count("hits"), runtime.cache.count("misses")
    assert sum(counters) == 6 * (LAYERS * 2 + 2 * 4)
    assert runtime.draft_hits + runtime.draft_misses == 6 * 2 * 4
    assert runtime.draft_misses < 20 if mode != "lru" else 8
    assert all(runtime.cache.is_resident(LAYERS, expert) for expert in (2, 3))
    assert runtime.num_tokens == 6
    runtime.close()


def test_a_drafters_passes_are_in_no_trace(store_with_drafter) -> None:
    """What its layers use moves no score of the model's, and is in no activation matrix."""
    store = store_with_drafter
    scores = []
    for drafts in (False, True):
        runtime = runtime_of(store, 12, 2, num_draft_layers=2)
        for position in range(4):
            one_step(runtime, store, [(0, 1)] * LAYERS, position)
            if drafts:
                a_pass(runtime, store, (2, 3), (4, 5))
        runtime.begin_step(decode_tokens(["a"], 4))
        runtime.policy.catch_up()
        scores.append(runtime.policy.scores.copy())
        assert runtime.cache.scores[LAYERS:].any() == drafts
        runtime.end_request("a")
        assert runtime.policy.forecast.collection.entry(0).counts.sum() == 4 * LAYERS * 2
        runtime.close()
    assert np.array_equal(*scores)


def test_an_expert_that_every_pass_uses_is_worth_as_much_as_the_models(
    store_with_drafter,
) -> None:
    """On one scale: with two passes a step through each layer it is used twice as often."""
    runtime = runtime_of(store_with_drafter, 20, 2, num_draft_layers=2)
    for _ in range(60):
        one_step(runtime, store_with_drafter, [(0, 1)] * LAYERS)
        for _ in range(2):
            a_pass(runtime, store_with_drafter, (2, 3), (4, 5))
    wanted = 2 * runtime.policy.full_score
    assert runtime.cache.scores[LAYERS, 2] == pytest.approx(wanted, rel=0.2)
    runtime.close()


def test_wrong_guesses_are_no_tokens(store) -> None:
    runtime = runtime_of(store, 12, 2)
    tokens = StepTokens.of_lengths(
        ["a"], np.array([4]), np.array([1]), np.array([False]), np.array([3], np.int32)
    )
    runtime.begin_step(tokens)
    for layer in range(LAYERS):
        run_layer(runtime, store, layer, torch.tensor([[0, 1]] * 4, dtype=torch.int32))
    assert runtime.num_tokens == 1
    runtime.verify({"a": 3})
    assert runtime.num_tokens == 2
    runtime.verify({"a": 3})
    assert runtime.num_tokens == 2
    runtime.close()


# ---- prefetch ------------------------------------------------------------------------------


def one_step(
    runtime: OffloadRuntime, store, experts: list[tuple[int, int]], position: int = 1
) -> None:
    runtime.begin_step(decode_tokens(["a"], position))
    for layer, pair in enumerate(experts):
        run_layer(runtime, store, layer, ids_of(*pair))


def test_what_was_foreseen_is_no_demand(store) -> None:
    foresight = Foresight()
    runtime = runtime_of(store, 8, 2, predictor=foresight)
    foresight.likely[1, [2, 3]] = 0.9
    runtime.begin_step(decode_tokens(["a"]))
    run_layer(runtime, store, 0, ids_of(0, 1))
    runtime.prefetcher.settle()  # the budget allows one read at a time at first
    assert runtime.cache.count("prefetch_issued") == 1
    run_layer(runtime, store, 1, ids_of(2, 3))
    assert runtime.cache.count("prefetch_useful") == 1
    assert runtime.cache.count("hits") == 1
    runtime.close()


def test_a_need_does_not_wait_for_what_was_foreseen_in_vain(store) -> None:
    foresight = Foresight()
    runtime = runtime_of(store, 8, 2, predictor=foresight)
    foresight.likely[1, [4, 5]] = 0.9
    runtime.begin_step(decode_tokens(["a"]))
    for layer, pair in enumerate([(0, 1), (2, 3), (0, 1), (0, 1)]):
        run_layer(runtime, store, layer, ids_of(*pair))
        runtime.prefetcher.settle()  # else it is dropped before it begins, if the disk is slow
    foresight.likely[...] = 0
    for _ in range(6):
        one_step(runtime, store, [(0, 1), (2, 3), (0, 1), (0, 1)])
    assert runtime.cache.count("prefetch_useful") == 0
    assert not runtime.cache.is_resident(1, 4)
    assert runtime.cache.count("prefetch_wasted") >= 1
    runtime.close()


def test_prefetching_changes_no_byte_and_no_need(store) -> None:
    generator = np.random.default_rng(0)
    foresight = Foresight()
    plain = runtime_of(store, 8, 2)
    ahead = runtime_of(store, 8, 2, predictor=foresight)
    for _ in range(30):
        foresight.likely = generator.random((LAYERS, EXPERTS)).astype(np.float32)
        routed = [
            tuple(generator.choice(EXPERTS, 2, replace=False).tolist()) for _ in range(LAYERS)
        ]
        for runtime in (plain, ahead):
            one_step(runtime, store, routed)
    needs = [
        runtime.cache.count("hits") + runtime.cache.count("misses")
        for runtime in (plain, ahead)
    ]
    assert needs[0] == needs[1] == 30 * LAYERS * 2
    assert ahead.cache.count("prefetch_issued") > 0
    plain.close()
    ahead.close()


@pytest.mark.parametrize("slots", [2, 3, 12, LAYERS * EXPERTS])
@pytest.mark.parametrize("with_request", [True, False])
def test_ids_of_no_expert_need_no_slots(store, slots: int, with_request: bool) -> None:
    """In one call, in waves and where ids pass through; the last expert is one of the needed."""
    runtime = runtime_of(store, slots, 0)
    ids = torch.tensor([[-1, -1], [2, EXPERTS - 1], [-1, 0], [3, 1]], dtype=torch.int32)
    if with_request:
        runtime.begin_step(decode_tokens(["a", "b", "c", "d"]))
    for layer in range(LAYERS):
        run_layer(runtime, store, layer, ids)
    needed = runtime.cache.count("hits") + runtime.cache.count("misses")
    assert needed == (5 * LAYERS if with_request else 0)
    runtime.close()


@pytest.mark.parametrize("slots", [12, LAYERS * EXPERTS])
def test_ids_of_other_ranks_experts_lie_with_the_tokens_own(store, slots: int) -> None:
    """Expert parallel: parameters are the pool, or, where everything fits, a layer of it."""
    runtime = runtime_of(store, slots, 0)
    own = torch.tensor([[-1, -1], [2, -1], [-1, 3]], dtype=torch.int32)
    routed = torch.tensor([[9, 10], [2, 11], [12, 3]], dtype=torch.int32)
    with runtime.dummy_run():
        for layer in range(LAYERS):
            assert not runtime.begin_layer(layer, own, None, routed).any()
            runtime.end_layer(layer)
    runtime.begin_step(decode_tokens(["a", "b", "c"]))
    for layer in range(LAYERS):
        found = runtime.begin_layer(layer, own, None, routed)
        assert found is not None
        begin = layer * EXPERTS if slots == LAYERS * EXPERTS else 0
        slot_of = {2: found[1, 0], 3: found[2, 1]}
        assert_slots_hold(
            runtime,
            store,
            layer,
            torch.tensor([2, 3]),
            torch.tensor([*slot_of.values()]) + begin,
        )
        assert found[1:].tolist() == [[slot_of[2]] * 2, [slot_of[3]] * 2]
        runtime.end_layer(layer)
    runtime.begin_step(decode_tokens(["a", "b", "c"]))
    for layer in range(LAYERS):
        nothing = runtime.begin_layer(layer, torch.full_like(own, -1), None, routed)
        assert nothing is not None
        assert not nothing.any(), "no kernel may read before its weights"
        runtime.end_layer(layer)
    runtime.close()


@pytest.mark.parametrize("slots", [2, 12])
def test_a_call_that_needs_nothing_gets_slot_0(store, slots: int) -> None:
    runtime = runtime_of(store, slots, 1)
    slots = runtime.begin_layer(0, torch.full((3, TOP_K), -1))
    assert slots is not None
    assert not slots.any()
    runtime.end_layer(0)
    runtime.begin_step(decode_tokens([]))
    slots = runtime.begin_layer(0, torch.full((3, TOP_K), 5))  # padding alone
    assert slots is not None
    assert not slots.any()
    runtime.end_layer(0)
    assert runtime.cache.count("misses") == 0
    runtime.close()


def test_a_read_error_ends_the_call_and_leaves_nothing_behind(tmp_path: Path) -> None:
    store = build(tmp_path, layout_of(8192, 12), LAYERS, EXPERTS)
    foresight = Foresight()
    runtime = runtime_of(store, 8, 2, predictor=foresight)
    foresight.likely[1, 0] = 0.9
    os.truncate(store.path, store.record_offset(1, 0))
    runtime.begin_step(decode_tokens(["a"]))
    run_layer(runtime, store, 0, ids_of(0, 1))
    with pytest.raises(TransferError, match=r"expert [01] of layer 1"):
        run_layer(runtime, store, 1, ids_of(0, 1))
    assert not runtime.cache.is_resident(1, 0)
    assert not runtime.cache.is_resident(1, 1)
    one_step(runtime, store, [(0, 1)])
    runtime.close()


def test_the_policy_catches_up_while_a_read_is_under_way(store, monkeypatch) -> None:
    runtime = runtime_of(store, 12, 2)
    transfer, calls = runtime._transfer, []
    for owner, name in (
        (transfer, "begin_read"),
        (runtime.policy, "catch_up"),
        (transfer, "end_read"),
    ):
        original = getattr(owner, name)

        def noted(*arguments, name=name, original=original):
            calls.append(name)
            return original(*arguments)

        monkeypatch.setattr(owner, name, noted)
    runtime.begin_step(decode_tokens(["a"]))
    run_layer(runtime, store, 0, ids_of(0, 1))
    assert calls == ["begin_read", "catch_up", "end_read"]
    runtime.close()


@pytest.mark.parametrize("id_type", [torch.int32, torch.int64])
def test_serving_observes_scores_and_counts_as_replay_does(store, id_type) -> None:
    """A layer call is one native call in serving, and several calls of the policy in replay."""
    runtime = runtime_of(store, 12, 2)
    policy = make_policy("trace", LAYERS, EXPERTS)
    cache = ExpertCache(runtime.cache.shape, policy.rules)
    policy.bind(cache)
    generator = np.random.default_rng(0)
    popular = generator.dirichlet(np.full(EXPERTS, 1.0), LAYERS)
    votes = np.zeros(EXPERTS, np.float32)
    for position in range(150):
        requests = ["a", "b", "c"][: 1 + position % 3]
        tokens = decode_tokens(requests, position)
        runtime.begin_step(tokens)
        policy.begin_step(tokens)
        for layer in range(LAYERS):
            chosen = [generator.choice(EXPERTS, TOP_K, False, popular[layer]) for _ in requests]
            ids = np.stack(chosen).astype(np.int32)
            run_layer(runtime, store, layer, torch.from_numpy(ids).to(id_type))
            votes[:] = 0
            np.add.at(votes, ids, tokens.weights[:, None])
            policy.observe(layer, ids, votes)
            assert cache.plan(layer, ids, PLAN_INSTANT)
            if cache.outcome.num_misses:
                policy.catch_up()
            cache.finish()
        policy.end_step()
        np.testing.assert_array_equal(runtime.cache.scores, cache.scores)
        np.testing.assert_array_equal(runtime.cache.page_table >= 0, cache.page_table >= 0)
        np.testing.assert_array_equal(runtime.cache.counters, cache.counters)
    assert cache.count("misses") > 50
    runtime.close()


# ---- the end -------------------------------------------------------------------------------


class Part:
    """Something that is closed, and may fail at that."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.closed = 0

    def close(self) -> None:
        self.closed += 1
        if self.error is not None:
            raise self.error


def test_each_part_is_closed_whatever_becomes_of_the_others(store) -> None:
    """A full disk at the end of a recording is no reason to lose the activation matrices."""
    runtime = runtime_of(store, 12, 2)
    recorder, collection = Part(OSError("no room")), Part(ValueError("damaged"))
    transfer = runtime._transfer
    last = Part()
    runtime._recorder, runtime._collection_file, runtime._transfer = recorder, collection, last
    with pytest.raises(ExceptionGroup, match="did not close") as caught:
        runtime.close()
    assert caught.value.exceptions == (recorder.error, collection.error)
    assert (recorder.closed, collection.closed, last.closed) == (1, 1, 1)
    runtime.close()
    assert last.closed == 1
    transfer.close()
