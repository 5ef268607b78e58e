"""The running sums, against a regression on all that they were told."""

from __future__ import annotations

import numpy as np

from vllm_moe_offload.forecast.ridge import RidgeSums


def test_weights_are_those_of_the_weighted_regression() -> None:
    generator = np.random.default_rng(0)
    inputs, outputs = generator.random((40, 3)), generator.random((40, 2))
    sums = RidgeSums(np.zeros((3, 3)), np.zeros((3, 2)))
    for x, y in zip(inputs, outputs, strict=True):
        sums.fade(0.9)
        sums.add(np.outer(x, x), np.outer(x, y))
    age = 0.9 ** np.arange(39, -1, -1.0)[:, None]
    toward = np.array([[1.0], [0.0], [-1.0]])
    gram, cross = sums.regular(2.0, toward)
    np.testing.assert_allclose(gram, inputs.T @ (age * inputs) + 2.0 * np.eye(3))
    np.testing.assert_allclose(cross, inputs.T @ (age * outputs) + 2.0 * toward)
    before = sums.gram.copy()
    gram += 1.0  # the caller's to keep
    np.testing.assert_array_equal(sums.gram, before)
