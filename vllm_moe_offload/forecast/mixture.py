"""How much each part of a forecast counts, learned from what was used next.

A score adds up several forecasts of the same thing: averages over few tokens and over many,
popularity, what other requests did. Which of them can be trusted depends on the model and on
the workload: where tokens come in runs the fast average does, where they are independent the
slowest. Their weights are those of a ridge regression (``forecast/ridge.py``) of the discounted
share of the coming steps' requests that use an expert on the forecasts. All experts share the
weights, so a single step is evidence from hundreds of them and the first few steps suffice.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.forecast.ridge import RidgeSums
from vllm_moe_offload.step import FloatArray

LEARNED_KEYS = 2048
"""Experts learned from in a step; of larger models a fixed sample, which is evidence enough."""
FITTED_EACH = 64
FITTED_EVERY = 8
"""The weights are refitted at each of the first steps, then every few: what a step adds to
hundreds of others is not worth its time."""
DISCOUNT = 0.4
"""Of the future, per step: ``g``. Low suits small caches, high large ones; between .3 and .6
hardly anything changes."""
MEMORY_STEPS = 100.0
"""Evidence kept, so that a running request is followed."""
KEEP = 1.0 - 1.0 / MEMORY_STEPS
RIDGE = 1.0
"""Pull towards the initial weights: that of a few experts in a single step."""


class Mixture:
    """Weights of forecasts.

    Attributes:
        parts: float32 ``[forecasts, size]``; what forecasts are made of, filled by the owner.
        mixing: float64 ``[forecasts, forecasts]``; forecast i is ``mixing[i] @ parts``.
        weights: float64 ``[forecasts]``, to be multiplied with the forecasts.
    """

    def __init__(self, initial: npt.NDArray[np.float64], size: int) -> None:
        """``initial``: weights ``[forecasts]`` before there is evidence."""
        count = len(initial)
        self.parts: FloatArray = np.zeros((count, size), np.float32)
        self.mixing: npt.NDArray[np.float64] = np.eye(count)
        self.weights: npt.NDArray[np.float64] = initial.copy()
        self._initial = initial.copy()
        # Odd, so that a sample meets every expert number and not those of one residue.
        self._stride = size // LEARNED_KEYS | 1
        self._sums = RidgeSums(np.zeros((count, count)), np.zeros(count))
        self._steps = 0
        self._trace: FloatArray = np.zeros((count, -(-size // self._stride)), np.float32)

    def learn(self, used: FloatArray) -> None:
        """Takes in what was used after the present forecasts.

        Args:
            used: ``[size]``, share of the requests that used each expert in this step.
        """
        self._steps += 1
        parts = np.ascontiguousarray(self.parts[:, :: self._stride])
        self._trace *= np.float32(DISCOUNT)
        self._trace += ((1.0 - DISCOUNT) * self.mixing).astype(np.float32) @ parts
        self._sums.fade(KEEP)
        self._sums.add(
            self.mixing @ (parts @ parts.T) @ self.mixing.T,
            self._trace @ used[:: self._stride],
        )

    def fit(self, active: npt.NDArray[np.bool_]) -> None:
        """Refits the weights now and then; those of forecasts that are not ``active`` are 0.

        None is negative: whatever the evidence so far, what is used more by one forecast
        must not score less.
        """
        if self._steps > FITTED_EACH and self._steps % FITTED_EVERY:
            return
        gram, cross = self._sums.regular(RIDGE, toward=self._initial)
        chosen = np.flatnonzero(active)
        self.weights[...] = 0.0
        while chosen.size:
            weights = np.linalg.solve(gram[np.ix_(chosen, chosen)], cross[chosen])
            worst = int(weights.argmin())
            if weights[worst] >= 0.0:
                self.weights[chosen] = weights
                return
            chosen = np.delete(chosen, worst)
