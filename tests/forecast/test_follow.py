"""Values and scores that follow the routing within a step, against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from tests.policy.test_policies import rows_of
from vllm_moe_offload.forecast.forecast import STATE_HALF_LIFE_TOKENS, VALUE, Forecast
from vllm_moe_offload.native import NativeError

LAYERS, EXPERTS, TOP_K = 5, 6, 2


def learned(requests: int, generator: np.random.Generator) -> Forecast:
    """A forecast in the middle of a step, whose successor model knows something."""
    forecast = Forecast(LAYERS, EXPERTS)
    model = forecast.model
    assert model is not None
    model.weights[...] = generator.normal(0, 0.5, model.weights.shape)
    model.bias[...] = generator.random(model.bias.shape)
    model.version = 1
    names = [f"r{index}" for index in range(requests)]
    forecast.begin_step(rows_of(names, [1] * requests))
    forecast.requests.state[:requests] = generator.random((requests, LAYERS * EXPERTS))
    return forecast


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [3, 1]])
def test_forecasts_follow_as_if_the_states_had_moved(lengths: list[int]) -> None:
    generator = np.random.default_rng(len(lengths))
    forecast = learned(len(lengths) + 1, generator)  # one request does not run in this step
    names = [f"r{index + 1}" for index in range(len(lengths))]
    forecast.begin_step(rows_of(names, lengths))
    model, states = forecast.model, forecast.requests.state
    assert model is not None
    count = len(forecast.requests)
    before = model.predict(states[:count])
    ids = generator.integers(0, EXPERTS, (LAYERS, sum(lengths), TOP_K)).astype(np.int32)
    scores = generator.random((LAYERS, EXPERTS)).astype(np.float32)
    factors = generator.random(LAYERS).astype(np.float32)
    given = scores.copy()
    forecast.follow(0, np.ascontiguousarray(ids[:2]), scores, factors)
    forecast.follow(2, np.ascontiguousarray(ids[2:4]), scores, factors)

    moved = states[:count].copy()
    decay = 2.0 ** (-1.0 / STATE_HALF_LIFE_TOKENS)
    owner = np.repeat(np.arange(len(lengths)), lengths) + 1
    seen = slice(0, 4 * EXPERTS)  # the last layer was not routed yet
    for index, length in enumerate(lengths):
        moved[index + 1, seen] *= decay**length
    for layer in range(4):
        np.add.at(moved, (owner[:, None], layer * EXPERTS + ids[layer]), 1 - decay)
    after = model.predict(moved)
    gain = (np.clip(after, 0, 1) - np.clip(before, 0, 1)).sum(axis=0).reshape(LAYERS, EXPERTS)
    weight = forecast._mixture.weights[VALUE] / count
    assert np.abs(gain).max() > 0.1
    np.testing.assert_allclose(scores, given + weight * factors[:, None] * gain, atol=1e-4)


def test_ids_of_no_expert_change_nothing() -> None:
    factors = np.ones(LAYERS, np.float32)
    followed = []
    for rows in ([[1, 3]], [[-1, -1]], [[3, -1]]):
        forecast = learned(1, np.random.default_rng(0))
        scores = np.zeros((LAYERS, EXPERTS), np.float32)
        forecast.follow(0, np.array([rows], np.int32), scores, factors)
        followed.append(scores)
    both, none, one = followed
    assert np.abs(both - none).max() > 0.01
    assert np.abs(one - none).max() > 0.01
    assert np.abs(both - one).max() > 0.01


def test_an_id_that_is_no_expert_is_an_error() -> None:
    forecast = learned(1, np.random.default_rng(0))
    ids = np.full((1, 1, TOP_K), EXPERTS, np.int32)
    scores, factors = np.zeros((LAYERS, EXPERTS), np.float32), np.ones(LAYERS, np.float32)
    with pytest.raises(NativeError, match=r"expert id 6 is outside \[0, 6\)"):
        forecast.follow(0, ids, scores, factors)
