"""What a forecast learns of a step with several tokens of a request."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_moe_offload.forecast.forecast import Forecast
from vllm_moe_offload.step import StepTokens, count_votes

LAYERS, EXPERTS, TOP_K = 2, 8, 2


def take_in(forecast: Forecast, ids: np.ndarray, first: int) -> None:
    tokens = StepTokens.of_lengths(
        ["a"], np.array([ids.shape[1]]), np.array([first]), np.array([False])
    )
    votes = np.zeros((LAYERS, EXPERTS), np.float32)
    for of_layer, of_votes in zip(ids, votes, strict=True):
        count_votes(np.ascontiguousarray(of_layer), tokens.weights, of_votes)
    forecast.begin_step(tokens)
    forecast.take_in(tokens, ids, votes)


@pytest.mark.parametrize("together", [2, 4])
def test_the_successor_model_learns_every_token(together: int) -> None:
    """Verified guesses of a drafter teach it what as many steps of one token do."""
    generator = np.random.default_rng(0)
    ids = generator.integers(0, EXPERTS, (LAYERS, 40, TOP_K)).astype(np.int32)
    one_by_one, drafted = Forecast(LAYERS, EXPERTS), Forecast(LAYERS, EXPERTS)
    for token in range(40):
        take_in(one_by_one, ids[:, token : token + 1].copy(), token)
    for first in range(0, 40, together):
        take_in(drafted, ids[:, first : first + together].copy(), first)
    assert drafted.model is not None
    assert one_by_one.model is not None
    assert drafted.model.num_tokens == one_by_one.model.num_tokens == 40
    np.testing.assert_allclose(
        drafted.requests.state[0], one_by_one.requests.state[0], atol=1e-6
    )
    np.testing.assert_allclose(
        drafted.requests.trace[0], one_by_one.requests.trace[0], atol=1e-6
    )
    np.testing.assert_allclose(
        drafted.model._sums.regular(1.0)[1], one_by_one.model._sums.regular(1.0)[1], atol=1e-5
    )
