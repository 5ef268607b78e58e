"""One behavioural suite over every policy."""

from __future__ import annotations

import numpy as np
import pytest

from scripts.synthetic_trace import synthetic_trace
from vllm_moe_offload.cache.planner import CacheShape, ExpertCache
from vllm_moe_offload.policy import POLICIES, make_policy
from vllm_moe_offload.policy.base import Policy
from vllm_moe_offload.replay.run import replay
from vllm_moe_offload.step import StepTokens

LAYERS, EXPERTS, TOP_K = 3, 16, 2
SERVING = [name for name in POLICIES if name != "belady"]
EVERY = [
    *POLICIES,
    "lrfu:half_life=32",
    "eamc:entries=3",
]


def rows_of(requests: list[str], lengths: list[int], position: int = 0) -> StepTokens:
    count = len(requests)
    return StepTokens.of_lengths(
        requests,
        np.array(lengths),
        np.full(count, position),
        np.array([length > 1 for length in lengths]),
    )


def step(policy: Policy, tokens: StepTokens, ids: np.ndarray) -> None:
    """One step; ids ``[layers, rows, top_k]``."""
    policy.begin_step(tokens)
    policy.catch_up()
    for layer, layer_ids in enumerate(ids):
        votes = np.zeros(EXPERTS, np.float32)
        for row, chosen in enumerate(layer_ids):
            votes[chosen] += tokens.weights[row]
        policy.observe(layer, layer_ids, votes)
    policy.end_step()


def some_ids(generator: np.random.Generator, rows: int) -> np.ndarray:
    ids = [
        [generator.choice(EXPERTS, TOP_K, replace=False) for _ in range(rows)]
        for _ in range(LAYERS)
    ]
    return np.array(ids, np.int32)


@pytest.mark.parametrize("name", SERVING)
def test_scores_stay_finite_in_prefill_decode_and_mixed_steps(name: str) -> None:
    policy = make_policy(name, LAYERS, EXPERTS)
    generator = np.random.default_rng(0)
    step(policy, rows_of(["a"], [7]), some_ids(generator, 7))
    for position in range(7, 40):
        step(policy, rows_of(["a", "b"], [1, 1], position), some_ids(generator, 2))
    step(policy, rows_of(["b", "c", "a"], [1, 5, 1], 40), some_ids(generator, 7))
    policy.end_request("a")
    step(policy, rows_of(["c"], [1], 50), some_ids(generator, 1))
    assert policy.scores.shape == (LAYERS, EXPERTS)
    assert np.isfinite(policy.scores).all()


@pytest.mark.parametrize("name", SERVING)
def test_bound_scores_are_the_ones_written(name: str) -> None:
    policy = make_policy(name, LAYERS, EXPERTS)
    cache = ExpertCache(CacheShape(LAYERS, EXPERTS, 8), policy.rules)
    before = policy.scores.copy()
    policy.bind(cache)
    np.testing.assert_array_equal(cache.scores, before)
    step(policy, rows_of(["a"], [1]), some_ids(np.random.default_rng(1), 1))
    assert np.shares_memory(policy.scores, cache.scores)
    np.testing.assert_array_equal(policy.scores, cache.scores)
    if policy.rules.order == 0 and name != "eamc":  # eamc follows at the next step
        assert (cache.scores != before).any()


@pytest.mark.parametrize("name", SERVING)
def test_same_routing_same_scores(name: str) -> None:
    first, second = (make_policy(name, LAYERS, EXPERTS) for _ in range(2))
    for policy in (first, second):
        generator = np.random.default_rng(2)
        for position in range(150):
            step(policy, rows_of(["a", "b"], [1, 1], position), some_ids(generator, 2))
    np.testing.assert_array_equal(first.scores, second.scores)


@pytest.mark.parametrize("name", ["lru", "lru-layer", "lfu", "lrfu", "eamc", "trace"])
def test_the_order_of_requests_does_not_matter(name: str) -> None:
    first, second = (make_policy(name, LAYERS, EXPERTS) for _ in range(2))
    generator = np.random.default_rng(3)
    for position in range(60):
        ids = some_ids(generator, 3)
        step(first, rows_of(["a", "b", "c"], [1, 1, 1], position), ids)
        step(second, rows_of(["c", "a", "b"], [1, 1, 1], position), ids[:, [2, 0, 1]])
    np.testing.assert_allclose(first.scores, second.scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SERVING)
def test_ending_a_stranger_changes_nothing(name: str) -> None:
    policy = make_policy(name, LAYERS, EXPERTS)
    step(policy, rows_of(["a"], [1]), some_ids(np.random.default_rng(4), 1))
    before = policy.scores.copy()
    policy.end_request("nobody")
    np.testing.assert_array_equal(policy.scores, before)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("concurrency", [1, 3])
def test_every_need_is_a_hit_or_a_miss(name: str, concurrency: int) -> None:
    trace = synthetic_trace(layers=4, experts=16, top_k=3, requests=5, tokens=20, seed=5)
    result = replay(trace, name, 0.25, concurrency)
    assert result.tokens == trace.ids.shape[0]
    assert result.misses_per_token == result.misses / result.tokens
    assert result.hit_rate == result.hits / (result.hits + result.misses)
    if concurrency == 1:
        assert result.hits + result.misses == trace.ids.size


@pytest.mark.parametrize("name", EVERY)
def test_no_policy_beats_belady_and_all_that_fits_misses_once(name: str) -> None:
    trace = synthetic_trace(layers=4, experts=16, top_k=3, requests=4, tokens=30, seed=6)
    bound = replay(trace, "belady", 0.3, 2).hit_rate
    assert replay(trace, name, 0.3, 2).hit_rate <= bound
    distinct = sum(np.unique(trace.ids[:, layer]).size for layer in range(4))
    assert replay(trace, name, 1.0, 2).misses == distinct


@pytest.mark.parametrize(
    "capacity",
    [
        pytest.param(0.125, marks=pytest.mark.slow),
        0.25,
        pytest.param(0.5, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("concurrency", [1, 4])
def test_trace_does_not_lose_to_a_plain_policy(capacity: float, concurrency: int) -> None:
    trace = synthetic_trace(layers=6, experts=32, top_k=4, requests=12, tokens=50, seed=7)
    best = max(
        replay(trace, name, capacity, concurrency).hit_rate
        for name in ("lru", "lru-layer", "lfu", "lrfu")
    )
    assert replay(trace, "trace", capacity, concurrency).hit_rate >= best - 0.003


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fifo", "unknown policy 'fifo'; choose from lru, lru-layer, lfu, lrfu, eamc, trace"),
        ("lrfu:half_life", "'half_life' is not of the form key=number"),
        ("lrfu:half_life=soon", "'half_life=soon' is not of the form key=number"),
        ("lrfu:half_life=0", "half_life must be a positive number of steps, got 0"),
        ("lru:size=3", "takes no such parameter"),
        ("trace:magic=1", "takes no such parameter"),
    ],
)
def test_wrong_specifications_say_what_is_allowed(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make_policy(spec, LAYERS, EXPERTS)


def test_lfu_counts_layer_calls() -> None:
    policy = make_policy("lfu", 1, EXPERTS)
    votes = np.zeros(EXPERTS, np.float32)
    for ids in ([[1, 2], [1, 3]], [[1, 2], [4, 2]]):
        policy.begin_step(rows_of(["a", "b"], [1, 1]))
        policy.catch_up()
        votes[...] = np.bincount(np.ravel(ids), minlength=EXPERTS) / 2
        policy.observe(0, np.array(ids), votes)
    assert policy.scores[0, 1:5].tolist() == [2, 2, 1, 1]


def test_lrfu_halves_in_its_half_life() -> None:
    policy = make_policy("lrfu:half_life=4", 1, EXPERTS)
    policy.begin_step(rows_of(["a"], [1]))
    policy.catch_up()
    used = np.eye(EXPERTS, dtype=np.float32)[5]
    policy.observe(0, np.array([[5]]), used)
    for _ in range(4):
        policy.observe(0, np.array([[6]]), np.eye(EXPERTS, dtype=np.float32)[6])
    assert policy.scores[0, 5] == pytest.approx(0.5)
