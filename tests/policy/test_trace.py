"""The trace policy: what each part of it must do, and faults it must not have."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from scripts.replay_questions.parts import REMOVALS
from scripts.synthetic_trace import synthetic_trace
from tests.policy.test_policies import EXPERTS, LAYERS, TOP_K, rows_of, some_ids, step
from vllm_moe_offload.cache.planner import CacheShape, ExpertCache
from vllm_moe_offload.policy.trace import TracePolicy
from vllm_moe_offload.replay.run import replay
from vllm_moe_offload.step import StepTokens
from vllm_moe_offload.trace.routing import RoutingTrace


@pytest.fixture
def without() -> Iterator[Callable[..., None]]:
    """Takes parts out of the policies that the test makes."""
    with contextlib.ExitStack() as stack:

        def remove(*parts: str) -> None:
            for part in parts:
                stack.enter_context(REMOVALS[part]())

        yield remove


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


def drafted_rows(length: int, drafted: int, position: int) -> StepTokens:
    return StepTokens.of_lengths(
        ["a"],
        np.array([length]),
        np.array([position]),
        np.array([False]),
        np.array([drafted], np.int32),
    )


@pytest.mark.parametrize("holds_everything", [False, True])
def test_what_a_drafter_guessed_wrong_teaches_nothing(holds_everything: bool) -> None:
    """The state after three guesses, one of them right, is that after a step of those tokens."""
    generator = np.random.default_rng(5)
    ids = [some_ids(generator, rows) for rows in (1, 4, 1)]
    forecasts = []
    for guesses in (True, False):
        slots = LAYERS * EXPERTS if holds_everything else 6
        policy = TracePolicy(LAYERS, EXPERTS)
        cache = ExpertCache(CacheShape(LAYERS, EXPERTS, slots), policy.rules)
        policy.bind(cache)
        step(policy, drafted_rows(1, 0, 0), ids[0])
        if guesses:
            step(policy, drafted_rows(4, 3, 1), ids[1])
            policy.verify({"a": 3})
        else:
            step(policy, drafted_rows(2, 0, 1), np.ascontiguousarray(ids[1][:, :2]))
        step(policy, drafted_rows(1, 0, 3), ids[2])
        policy.verify({"a": 4})
        policy.end_request("a")
        forecasts.append(policy.forecast)
    with_guesses, without_guesses = forecasts
    assert np.array_equal(
        with_guesses.collection.distribution(0), without_guesses.collection.distribution(0)
    )
    assert with_guesses.collection.entry(0).counts.sum() == LAYERS * TOP_K * 4
    assert np.array_equal(with_guesses.scores, without_guesses.scores)


def test_guesses_of_batches_in_turn_are_in_the_matrices() -> None:
    """As in a pipeline: whether a guess was right shows after another batch's step."""
    policy = TracePolicy(LAYERS, EXPERTS)
    generator = np.random.default_rng(7)
    for number in range(5):
        for name in "ab":
            policy.verify({name: 4 * number})
            tokens = StepTokens.of_lengths(
                [name],
                np.array([4]),
                np.array([4 * number]),
                np.array([False]),
                np.array([3], np.int32),
            )
            step(policy, tokens, some_ids(generator, 4))
    policy.verify({"a": 20, "b": 19})
    for name in "ab":
        policy.end_request(name)
    counted = [policy.forecast.collection.entry(i).counts.sum() for i in range(2)]
    assert counted == [LAYERS * TOP_K * 20, LAYERS * TOP_K * 19]


def test_of_a_request_of_which_nothing_is_said_only_certain_tokens_count() -> None:
    policy = TracePolicy(LAYERS, EXPERTS)
    step(policy, drafted_rows(4, 3, 0), some_ids(np.random.default_rng(5), 4))
    policy.end_request("a")
    assert policy.forecast.collection.entry(0).counts.sum() == LAYERS * TOP_K


def test_the_collection_grows_by_every_finished_request_of_a_batch() -> None:
    """The reference implementation never fills it."""
    policy = TracePolicy(LAYERS, EXPERTS)
    names = ["a", "b", "c"]
    step(policy, rows_of(names, [1, 1, 1]), some_ids(np.random.default_rng(0), 3))
    for name in names:
        policy.end_request(name)
    assert len(policy.forecast.collection) == 3


def test_a_finished_request_stops_counting_at_once(without) -> None:
    without("successor model", "collection of activation matrices", "popularity")
    with_past, fresh = TracePolicy(LAYERS, EXPERTS), TracePolicy(LAYERS, EXPERTS)
    ids = some_ids(np.random.default_rng(1), 2)
    step(with_past, rows_of(["a", "b"], [1, 1]), ids)
    with_past.end_request("a")
    step(fresh, rows_of(["b"], [1]), ids[:, 1:])
    for policy in (with_past, fresh):
        policy.begin_step(rows_of(["b"], [1], 1))
        policy.catch_up()
    np.testing.assert_allclose(with_past.scores, fresh.scores, rtol=1e-5)


def test_what_finished_requests_used_is_known_by_the_collection(without) -> None:
    without("own history", "popularity", "successor model")
    policy = TracePolicy(LAYERS, EXPERTS)
    run_request(policy, "old", (3, 4), 20)
    policy.end_request("old")
    policy.begin_step(rows_of(["new"], [1]))
    policy.catch_up()
    others = np.delete(policy.scores, [3, 4], axis=1)
    assert policy.scores[:, [3, 4]].min() > others.max() + 0.01


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


def test_a_request_that_waits_keeps_counting(without) -> None:
    without("successor model", "popularity")
    policy = TracePolicy(LAYERS, EXPERTS)
    run_request(policy, "a", (1, 2), 5)
    step(policy, rows_of(["b"], [1]), constant_ids(1, (8, 9)))
    policy.begin_step(rows_of(["b"], [1], 1))
    policy.catch_up()
    assert (policy.scores[:, [1, 2]] > 0).all()


def test_the_layer_just_passed_is_worth_least(without) -> None:
    without("successor model")
    policy = TracePolicy(2, EXPERTS)
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


@pytest.mark.parametrize("model", [True, False])
def test_full_score_is_what_an_expert_of_every_token_tends_to(without, model: bool) -> None:
    without("distance to the next visit", *([] if model else ["successor model"]))
    policy = TracePolicy(LAYERS, EXPERTS)
    run_request(policy, "a", (3, 4), 1000)
    policy.begin_step(rows_of(["a"], [1], 1000))
    policy.catch_up()
    assert policy.scores[:, 3] == pytest.approx(policy.full_score, rel=0.1)


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


def test_memory_is_given_back_by_ended_requests() -> None:
    policy = TracePolicy(LAYERS, EXPERTS)
    generator = np.random.default_rng(5)
    for index in range(40):
        step(policy, rows_of([f"r{index}"], [1]), some_ids(generator, 1))
        policy.end_request(f"r{index}")
    assert len(policy.forecast.requests) == 0
    assert len(policy.forecast.requests.tokens) == 8
    assert len(policy.forecast.tracer) == 0


def test_where_everything_fits_only_traces_are_kept() -> None:
    policy = TracePolicy(2, 4)
    cache = ExpertCache(CacheShape(2, 4, 8), policy.rules)
    policy.bind(cache)
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
