"""Cross-layer prediction."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_moe_offload.forecast.coactivation import MAX_STEP_TOKENS, CrossLayerPredictor
from vllm_moe_offload.step import StepTokens

LAYERS, EXPERTS = 4, 8


def rows_of(count: int, *, prefill: bool = False) -> StepTokens:
    return StepTokens.of_lengths(
        [f"r{index}" for index in range(count)],
        np.ones(count, np.int64),
        np.arange(count),
        np.full(count, prefill),
    )


def taught(steps: int = 150) -> CrossLayerPredictor:
    """Layer l + 1 uses expert e + 1 where layer l used e."""
    predictor = CrossLayerPredictor(LAYERS, EXPERTS, depth=2)
    generator = np.random.default_rng(0)
    for _ in range(steps):
        start = generator.integers(0, EXPERTS, (2, 1))
        predictor.begin_step(rows_of(2))
        for layer in range(LAYERS):
            predictor.observe(layer, (start + layer) % EXPERTS)
        predictor.end_step()
    return predictor


def test_it_learns_what_follows_in_the_next_layers() -> None:
    predictor = taught()
    predictor.begin_step(rows_of(1))
    predictor.observe(0, np.array([[3]]))
    one, two = predictor.probabilities(0, 1), predictor.probabilities(0, 2)
    assert one.shape == (EXPERTS,)
    assert one.dtype == np.float32
    assert (one.argmax(), two.argmax()) == (4, 5)
    assert one[4] > 0.8
    assert np.delete(one, 4).max() < 0.3


def test_ids_of_no_expert_say_nothing() -> None:
    predictor = taught()
    predictor.begin_step(rows_of(2))
    predictor.observe(0, np.array([[3, -1], [-1, -1]]))
    with_them = predictor.probabilities(0, 1)
    predictor.begin_step(rows_of(2))
    predictor._used[0, 0, 3] = 1.0
    np.testing.assert_array_equal(with_them, predictor.probabilities(0, 1))


def test_every_request_of_a_step_counts() -> None:
    predictor = taught()
    predictor.begin_step(rows_of(2))
    predictor.observe(0, np.array([[0], [5]]))
    likely = predictor.probabilities(0, 1)
    assert set(np.argsort(likely)[-2:].tolist()) == {1, 6}


def test_nothing_lies_beyond_the_last_layer() -> None:
    predictor = taught()
    predictor.begin_step(rows_of(1))
    for layer in range(LAYERS):
        predictor.observe(layer, np.array([[layer]]))
        for ahead in (1, 2):
            known = predictor.probabilities(layer, ahead) is not None
            assert known == (layer + ahead < LAYERS)


def test_nothing_is_predicted_too_early_or_in_prefill() -> None:
    fresh = CrossLayerPredictor(LAYERS, EXPERTS)
    fresh.begin_step(rows_of(1))
    fresh.observe(0, np.array([[3]]))
    assert fresh.probabilities(0, 1) is None
    for tokens in (rows_of(1, prefill=True), rows_of(MAX_STEP_TOKENS + 1)):
        predictor = taught()
        predictor.begin_step(tokens)
        predictor.observe(0, np.zeros((tokens.request_of_token.size, 1), np.int64))
        assert predictor.probabilities(0, 1) is None
        predictor.end_step()


def test_ended_requests_leave() -> None:
    predictor = taught()
    assert len(predictor._history) == 2
    predictor.end_request("r0")
    predictor.end_request("stranger")
    assert list(predictor._history) == ["r1"]


def test_many_experts_share_inputs() -> None:
    predictor = CrossLayerPredictor(3, 200, depth=1)
    for start in range(70):
        predictor.begin_step(rows_of(2))
        for layer in range(3):
            predictor.observe(layer, np.array([[start], [start + 100]]))
        predictor.end_step()
    predictor.begin_step(rows_of(1))
    predictor.observe(0, np.array([[10]]))
    assert predictor.probabilities(0, 1).shape == (200,)


def test_depth_is_checked() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        CrossLayerPredictor(LAYERS, EXPERTS, depth=0)
