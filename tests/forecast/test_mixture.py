"""The mixture trusts what turned out right."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_moe_offload.forecast.mixture import LEARNED_KEYS, Mixture

ALL = np.ones(3, np.bool_)


def fed(mixture: Mixture, right: int, steps: int, seed: int = 0) -> None:
    """Forecast ``right`` is the probability of use, the others are noise."""
    generator = np.random.default_rng(seed)
    size = mixture.parts.shape[1]
    chance = generator.random(size)
    for _ in range(steps):
        mixture.parts[...] = generator.random(mixture.parts.shape)
        mixture.parts[right] = chance
        mixture.learn((generator.random(size) < chance).astype(np.float32))
        mixture.fit(ALL)


def mixture_of(size: int = 200) -> Mixture:
    return Mixture(np.array([0.5, 0.5, 0.0]), size)


def test_keeps_the_initial_weights_without_evidence() -> None:
    mixture = mixture_of()
    mixture.fit(ALL)
    assert mixture.weights == pytest.approx([0.5, 0.5, 0.0])


@pytest.mark.parametrize("size", [200, 3 * LEARNED_KEYS + 1])
def test_a_few_steps_tell_the_right_forecast(size: int) -> None:
    mixture = mixture_of(size)
    fed(mixture, right=2, steps=20)
    assert mixture.weights[2] > 0.8
    assert mixture.weights[:2].max() < 0.15


def test_follows_when_another_forecast_becomes_right() -> None:
    mixture = mixture_of()
    fed(mixture, right=2, steps=200)
    fed(mixture, right=0, steps=200, seed=1)
    assert mixture.weights[0] > 0.8


def test_weights_are_never_negative_and_0_where_not_active() -> None:
    mixture = mixture_of()
    fed(mixture, right=2, steps=10)
    mixture._sums.cross[1] = -100.0  # used the less the more it was forecast
    mixture.fit(np.array([False, True, True]))
    assert mixture.weights[:2].tolist() == [0.0, 0.0]
    assert mixture.weights[2] > 0
