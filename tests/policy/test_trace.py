"""The trace policy: what each part of it must do, and faults it must not have."""

from __future__ import annotations

import numpy as np
import pytest

from scripts.synthetic_trace import synthetic_trace
from tests.policy.test_policies import EXPERTS, LAYERS, TOP_K, rows_of, some_ids, step
from vllm_moe_offload.cache.planner import CacheShape, ExpertCache
from vllm_moe_offload.forecast.successor import SuccessorModel
from vllm_moe_offload.policy.shadow import bind_policy
from vllm_moe_offload.policy.trace import TracePolicy
from vllm_moe_offload.replay.run import replay
from vllm_moe_offload.trace.routing import RoutingTrace


def constant_ids(rows: int, experts: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(np.array(experts, np.int32), (LAYERS, rows, TOP_K)).copy()


def run_request(policy: TracePolicy, name: str, experts: tuple[int, ...], tokens: int) -> None:
    for position in range(tokens):
        step(policy, rows_of([name], [1], position), constant_ids(1, experts))


def test_a_request_is_predicted_on_its_first_iteration() -> None:
    """The reference implementation predicts nothing before the second token."""
    policy = TracePolicy(LAYERS, EXPERTS)
    run_request(policy, "old", (3, 4), 20)
    policy.end_request("old")
    policy.begin_step(rows_of(["new"], [1]))
    policy.catch_up()
    assert (policy.scores[:, [3, 4]] > 0).all()
    assert policy.scores[:, [3, 4]].min() > np.delete(policy.scores, [3, 4], axis=1).max()


def test_the_prompt_finds_the_requests_of_its_kind() -> None:
    policy = TracePolicy(LAYERS, EXPERTS, value=0, history=0, popularity=0)
    kinds = (("x", (1, 2), (3, 4)), ("y", (5, 6), (7, 8)))
    for name, prompt, answer in kinds * 3:
        step(policy, rows_of([name], [30]), constant_ids(30, prompt))
        for position in range(30, 50):
            step(policy, rows_of([name], [1], position), constant_ids(1, answer))
        policy.end_request(name)
    step(policy, rows_of(["new"], [30]), constant_ids(30, (5, 6)))
    policy.forecast.requests.tokens[:] = 1  # due for its next match
    policy.begin_step(rows_of(["new"], [1], 30))
    policy.catch_up()
    assert (policy.scores[:, 7] > policy.scores[:, 3]).all()


def test_the_collection_grows_by_every_finished_request_of_a_batch() -> None:
    """The reference implementation never fills it."""
    policy = TracePolicy(LAYERS, EXPERTS)
    names = ["a", "b", "c"]
    step(policy, rows_of(names, [1, 1, 1]), some_ids(np.random.default_rng(0), 3))
    for name in names:
        policy.end_request(name)
    assert len(policy.forecast.collection) == 3


@pytest.mark.parametrize("follow", [0, 1])
def test_a_finished_request_stops_counting_at_once(follow: int) -> None:
    parts = {"value": 0, "prior": 0, "popularity": 0, "follow": follow}
    with_past, fresh = (
        TracePolicy(LAYERS, EXPERTS, **parts),
        TracePolicy(LAYERS, EXPERTS, **parts),
    )
    ids = some_ids(np.random.default_rng(1), 2)
    step(with_past, rows_of(["a", "b"], [1, 1]), ids)
    with_past.end_request("a")
    step(fresh, rows_of(["b"], [1]), ids[:, 1:])
    for policy in (with_past, fresh):
        policy.begin_step(rows_of(["b"], [1], 1))
        policy.catch_up()
    np.testing.assert_allclose(with_past.scores, fresh.scores, rtol=1e-5)


def test_no_request_of_a_batch_overwrites_another() -> None:
    """In the reference implementation the last sequence of a batch wins."""
    policy = TracePolicy(LAYERS, EXPERTS)
    ids = np.concatenate([constant_ids(1, (1, 2)), constant_ids(1, (8, 9))], axis=1)
    for position in range(5):
        step(policy, rows_of(["a", "b"], [1, 1], position), ids)
    policy.begin_step(rows_of(["a", "b"], [1, 1], 5))
    policy.catch_up()
    np.testing.assert_allclose(policy.scores[:, [1, 2]], policy.scores[:, [8, 9]], rtol=1e-5)
    assert (policy.scores[:, [1, 2]] > 0).all()


def test_a_request_that_waits_keeps_counting() -> None:
    policy = TracePolicy(LAYERS, EXPERTS, value=0, prior=0)
    run_request(policy, "a", (1, 2), 5)
    step(policy, rows_of(["b"], [1]), constant_ids(1, (8, 9)))
    policy.begin_step(rows_of(["b"], [1], 1))
    policy.catch_up()
    assert (policy.scores[:, [1, 2]] > 0).all()


def test_the_layer_just_passed_is_worth_least() -> None:
    policy = TracePolicy(2, EXPERTS, value=0, prior=0)
    tokens = rows_of(["a"], [1])
    ids = np.array([[[1, 2]], [[1, 2]]], np.int32)
    votes = np.zeros(EXPERTS, np.float32)
    votes[[1, 2]] = 1
    for _ in range(3):
        policy.begin_step(tokens)
        policy.catch_up()
        policy.observe(0, ids[0], votes)
        after_first = policy.scores[:, 1].copy()
        policy.observe(1, ids[1], votes)
        policy.end_step()
    # Layer 1 comes next although it used the expert no more often.
    assert after_first[1] > after_first[0] * 0.9
    assert policy.scores[0, 1] > policy.scores[1, 1]


def test_full_score_is_what_an_expert_of_every_token_tends_to() -> None:
    for parts, tokens in (({}, 1000), ({"value": 0, "history": 2}, 2000)):
        policy = TracePolicy(LAYERS, EXPERTS, distance_weight=0, **parts)
        run_request(policy, "a", (3, 4), tokens)
        policy.begin_step(rows_of(["a"], [1], tokens))
        policy.catch_up()
        assert policy.scores[:, 3] == pytest.approx(policy.full_score, rel=0.1)


def test_fallback_follows_the_winner() -> None:
    trace = synthetic_trace(layers=4, experts=32, top_k=4, requests=4, tokens=600, seed=2)
    # What was used counts against an expert: as wrong as a policy can be.
    wrong = "trace:history=-1,popularity=-1,value=0,prior=0"
    alone = replay(trace, wrong + ",fallback=0", 0.25, 1).hit_rate
    saved = replay(trace, wrong, 0.25, 1).hit_rate
    plain = replay(trace, "lrfu", 0.25, 1).hit_rate
    assert alone < plain - 0.2
    assert saved > alone + 0.7 * (plain - alone)


def test_a_shift_of_the_workload_is_followed() -> None:
    before, after = (
        synthetic_trace(layers=4, experts=32, top_k=4, requests=10, tokens=60, topics=1, seed=s)
        for s in (3, 4)
    )
    both = RoutingTrace(
        ids=np.concatenate([before.ids, after.ids]),
        starts=np.concatenate([before.starts, after.starts + before.ids.shape[0]]),
        lens=np.concatenate([before.lens, after.lens]),
        num_experts=32,
    )
    split = {
        name: (replay(both, name, 0.25, 2), replay(both, name, 0.25, 2, num_requests=10))
        for name in ("trace", "lrfu")
    }
    after_shift = {
        name: (whole.hits - first.hits)
        / (whole.hits + whole.misses - first.hits - first.misses)
        for name, (whole, first) in split.items()
    }
    assert after_shift["trace"] >= after_shift["lrfu"] - 0.003


def test_options_reach_the_policy() -> None:
    policy = TracePolicy(LAYERS, EXPERTS, entries=7, value=0)
    assert policy.forecast.collection.capacity == 7
    assert policy.forecast.model is None


def test_memory_is_given_back_by_ended_requests() -> None:
    policy = TracePolicy(LAYERS, EXPERTS)
    generator = np.random.default_rng(5)
    for index in range(40):
        step(policy, rows_of([f"r{index}"], [1]), some_ids(generator, 1))
        policy.end_request(f"r{index}")
    assert len(policy.forecast.requests) == 0
    assert len(policy.forecast.requests.tokens) == 8
    assert len(policy.forecast.tracer) == 0


class TestSuccessorModel:
    """The linear model by itself."""

    def model(self, size: int = 6, **changes: float) -> SuccessorModel:
        options = {"discount": 0.5, "ridge": 0.1, "memory_tokens": 1e5} | changes
        return SuccessorModel(1, size, **options)

    def feed(self, model: SuccessorModel, sequence: list[int]) -> np.ndarray:
        """Learns a sequence of single experts; returns the last state."""
        activity = np.zeros((1, model.size), np.float32)
        trace = np.zeros((1, model.state_size + 1), np.float32)
        for position, expert in enumerate(sequence):
            if position:
                model.discount_traces(trace, activity, np.array([0]))
            used = np.zeros((1, model.size), np.float32)
            used[0, expert] = 1
            activity = activity * 0.5 + used * 0.5
            model.learn(activity, trace, used)
        return activity

    def test_predicts_nothing_before_it_learned(self) -> None:
        model = self.model()
        assert not model.predict(np.ones((2, 6), np.float32)).any()
        assert model.version == 0

    def test_learns_what_follows_what(self) -> None:
        model = self.model()
        state = self.feed(model, [0, 1, 2] * 200)  # ends after a 2: 0 comes next
        forecast = model.predict(state)[0]
        assert forecast.argmax() == 0
        # Uses of 0 at 1, 4, 7, ...: 0.5 * (1 + 1/8 + 1/64 + ...) = 4/7
        assert forecast[:3] == pytest.approx([4 / 7, 2 / 7, 1 / 7], abs=0.03)
        assert forecast[3:] == pytest.approx([0, 0, 0], abs=0.01)

    def test_wide_models_have_bounded_weights(self) -> None:
        model = SuccessorModel(8, 1024, discount=0.7, ridge=1.0, memory_tokens=1e4)
        assert model.weights.size <= 1 << 22
        states = np.zeros((2, model.state_size), np.float32)
        twice = np.array([0, 0]), np.array([5, 4000])
        model.add_uses(states, *twice, np.array([1, 1], np.float32))
        assert np.count_nonzero(states[0]) in (1, 2)
        assert not states[1].any()
        assert model.predict(states).shape == (2, 8192)

    def test_a_wide_model_is_solved_column_by_column(self) -> None:
        """At once it would hold up a step; until it is done the old weights hold."""
        model = SuccessorModel(2, 1024, discount=0.7, ridge=1.0, memory_tokens=1e4)
        generator = np.random.default_rng(0)
        steps = 0
        while not model.version:
            states = generator.random((4, model.state_size), np.float32)
            traces = generator.random((4, model.state_size + 1), np.float32)
            used = (generator.random((4, model.size)) < 0.1).astype(np.float32)
            model.learn(states, traces, used)
            steps += 1
            if steps == 25:  # 100 tokens: a refit begins
                gram = model._gram + np.eye(model.state_size + 1, dtype=np.float32)
                expected = np.linalg.solve(gram, model._cross)
        assert steps == 25 + 2048 // 256
        np.testing.assert_allclose(model.weights, expected[:-1], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(model.bias, expected[-1], rtol=1e-3, atol=1e-4)

    def test_old_evidence_fades(self) -> None:
        model = self.model(memory_tokens=200)
        self.feed(model, [0, 1] * 500)
        state = self.feed(model, [0, 2] * 500)
        forecast = model.predict(state)[0]
        assert forecast[1] < 0.05


def test_where_everything_fits_only_traces_are_kept() -> None:
    policy = TracePolicy(2, 4)
    cache = ExpertCache(CacheShape(2, 4, 8), policy.rules)
    bind_policy(policy, cache)
    before = policy.scores.copy()
    for position in range(3):
        policy.begin_step(rows_of(["a"], [1], position))
        for layer in range(2):
            policy.observe(layer, np.array([[1, 2]], np.int32), np.ones(4, np.float32))
        policy.end_step()
    assert np.array_equal(cache.scores, before)
    policy.end_request("a")
    assert len(policy.forecast.collection) == 1
    assert np.array_equal(
        policy.forecast.collection.mean() > 0, [[False, True, True, False]] * 2
    )
