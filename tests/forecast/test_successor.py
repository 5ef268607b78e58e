"""The linear model by itself."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_moe_offload.forecast import successor
from vllm_moe_offload.forecast.successor import SuccessorModel


@pytest.fixture(autouse=True)
def quick_to_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little regularisation, and a short future whose values are easily told."""
    monkeypatch.setattr(successor, "DISCOUNT", np.float32(0.5))
    monkeypatch.setattr(successor, "RIDGE", 0.1)


def feed(model: SuccessorModel, sequence: list[int]) -> np.ndarray:
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


def test_predicts_nothing_before_it_learned() -> None:
    model = SuccessorModel(1, 6)
    assert not model.predict(np.ones((2, 6), np.float32)).any()
    assert model.version == 0


def test_learns_what_follows_what() -> None:
    model = SuccessorModel(1, 6)
    state = feed(model, [0, 1, 2] * 200)  # ends after a 2: 0 comes next
    forecast = model.predict(state)[0]
    assert forecast.argmax() == 0
    # Uses of 0 at 1, 4, 7, ...: 0.5 * (1 + 1/8 + 1/64 + ...) = 4/7
    assert forecast[:3] == pytest.approx([4 / 7, 2 / 7, 1 / 7], abs=0.03)
    assert forecast[3:] == pytest.approx([0, 0, 0], abs=0.01)


def test_wide_models_have_bounded_weights() -> None:
    model = SuccessorModel(8, 1024)
    assert model.weights.size <= 1 << 22
    states = np.zeros((2, model.state_size), np.float32)
    twice = np.array([0, 0]), np.array([5, 4000])
    model.add_uses(states, *twice, np.array([1, 1], np.float32))
    assert np.count_nonzero(states[0]) in (1, 2)
    assert not states[1].any()
    assert model.predict(states).shape == (2, 8192)


def test_a_wide_model_is_solved_column_by_column() -> None:
    """At once it would hold up a step; until it is done the old weights hold."""
    model = SuccessorModel(2, 1024)
    generator = np.random.default_rng(0)
    steps = 0
    while not model.version:
        states = generator.random((4, model.state_size), np.float32)
        traces = generator.random((4, model.state_size + 1), np.float32)
        used = (generator.random((4, model.size)) < 0.1).astype(np.float32)
        model.learn(states, traces, used)
        steps += 1
        if steps == 25:  # 100 tokens: a refit begins
            ridge = 0.1 * np.eye(model.state_size + 1, dtype=np.float32)
            gram = model._sums.gram + ridge
            expected = np.linalg.solve(gram, model._sums.cross)
    assert steps == 25 + 2048 // 256
    np.testing.assert_allclose(model.weights, expected[:-1], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(model.bias, expected[-1], rtol=1e-3, atol=1e-4)


def test_old_evidence_fades(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(successor, "MEMORY_TOKENS", 200.0)
    model = SuccessorModel(1, 6)
    feed(model, [0, 1] * 500)
    state = feed(model, [0, 2] * 500)
    forecast = model.predict(state)[0]
    assert forecast[1] < 0.05
