"""Belady's bound and the paper's EAMC policy."""

from __future__ import annotations

import numpy as np
import pytest

from scripts.synthetic_trace import synthetic_trace
from tests.policy.test_policies import rows_of
from vllm_moe_offload.policy import make_policy
from vllm_moe_offload.policy.eamc import EAMC
from vllm_moe_offload.replay.run import replay
from vllm_moe_offload.replay.schedule import decode_schedule


def furthest_next_use(calls: list[tuple[int, set[int]]], slots: int) -> int:
    """Hits of Belady's rule with bypass, by looking ahead from every call."""

    def next_use(key: tuple[int, int], after: int) -> float:
        layer, expert = key
        for later in range(after + 1, len(calls)):
            if calls[later][0] == layer and expert in calls[later][1]:
                return later
        return float("inf")

    cached: set[tuple[int, int]] = set()
    hits = 0
    for now, (layer, need) in enumerate(calls):
        keys = {(layer, expert) for expert in need}
        hits += len(keys & cached)
        # Keep, of all that is there and all that came, what is used soonest.
        candidates = sorted(cached | keys, key=lambda key: next_use(key, now))
        cached = {key for key in candidates[:slots] if next_use(key, now) < float("inf")}
    return hits


@pytest.mark.parametrize("concurrency", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_belady_equals_looking_ahead(concurrency: int, seed: int) -> None:
    trace = synthetic_trace(layers=3, experts=8, top_k=2, requests=4, tokens=15, seed=seed)
    schedule = decode_schedule(trace, concurrency)
    calls = []
    for step in range(schedule.num_steps):
        tokens = schedule.token[schedule.offsets[step] : schedule.offsets[step + 1]]
        calls += [(layer, set(trace.ids[tokens, layer].ravel().tolist())) for layer in range(3)]
    expected = furthest_next_use(calls, 6)
    assert replay(trace, "belady", 0.25, concurrency).hits == expected


def test_belady_cannot_serve() -> None:
    policy = make_policy("belady", 2, 4)
    policy.begin_step(rows_of(["a"], [1]))
    policy.catch_up()
    with pytest.raises(RuntimeError, match="cannot serve"):
        policy.observe(0, np.array([[1, 2]]), np.zeros(4, np.float32))


def request(policy: EAMC, name: str, experts: list[int], tokens: int) -> None:
    for position in range(tokens):
        policy.begin_step(rows_of([name], [1], position))
        policy.catch_up()
        for layer, expert in enumerate(experts):
            policy.observe(layer, np.array([[expert]]), np.zeros(4, np.float32))
        policy.end_step()


def test_eamc_scores_by_the_nearest_finished_request() -> None:
    policy = EAMC(2, 4)
    request(policy, "x", [0, 2], 5)
    request(policy, "y", [1, 3], 5)
    policy.end_request("x")
    policy.end_request("y")
    request(policy, "new", [1, 3], 1)
    policy.begin_step(rows_of(["new"], [1], 1))
    policy.catch_up()
    eps = 1e-4
    expected = [[eps, 1 + eps, eps, eps], [eps / 2, eps / 2, eps / 2, (1 + eps) / 2]]
    np.testing.assert_allclose(policy.scores, expected, rtol=1e-4)


def test_eamc_matches_observed_rows_not_future_ones() -> None:
    """What was not observed yet must not push a request away from its kind."""
    policy = EAMC(4, 4)
    request(policy, "long", [0, 1, 2, 3], 8)
    request(policy, "other", [3, 3, 3, 3], 1)
    policy.end_request("long")
    policy.end_request("other")
    policy.begin_step(rows_of(["new"], [1]))
    policy.catch_up()
    policy.observe(0, np.array([[0]]), np.zeros(4, np.float32))
    policy.begin_step(rows_of(["new"], [1]))  # a step that broke off after one layer
    policy.catch_up()
    assert policy.scores[:, 3].argmax() == 3
    assert policy.scores[0, 0] > policy.scores[0, 3]


def test_eamc_takes_the_mean_over_requests() -> None:
    policy = EAMC(1, 4)
    for name, expert in (("x", 0), ("y", 1)):
        request(policy, name, [expert], 3)
        policy.end_request(name)
    for name, expert in (("a", 0), ("b", 1)):
        request(policy, name, [expert], 1)
    policy.begin_step(rows_of(["a", "b"], [1, 1], 1))
    policy.catch_up()
    np.testing.assert_allclose(policy.scores[0], [0.5, 0.5, 0, 0], atol=2e-4)
