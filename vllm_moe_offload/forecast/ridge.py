"""Running sums of a ridge regression that is learned online, on what is yet to come.

Forecasts are linear in inputs x, and what they forecast is the discounted future

    u_t = (1 - g) * sum over j >= 1 of g**(j - 1) * y_{t + j}

of what is observed, y. Least-squares temporal differences with lambda = 1 (Bradtke & Barto, 1996;
Boyan, 2002) need two running sums for that and no memory of the past,

    G = sum x xT          R = sum e yT          e_t = g * e_{t - 1} + (1 - g) * x_{t - 1}

where the eligibility trace e credits every earlier input for y. Old evidence fades, so that a
shift of the workload is followed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]


class RidgeSums:
    """G and R.

    Attributes:
        gram: ``[inputs, inputs]``.
        cross: ``[inputs, outputs]``, or ``[inputs]`` where there is one output.
    """

    def __init__(self, gram: Floats, cross: Floats) -> None:
        """Takes the arrays over."""
        self.gram = gram
        self.cross = cross

    def fade(self, keep: float) -> None:
        """Keeps so much of the evidence."""
        self.gram *= keep
        self.cross *= keep

    def add(self, gram: Floats, cross: Floats) -> None:
        """Takes in evidence: sums of ``x xT`` and ``e yT``."""
        self.gram += gram
        self.cross += cross

    def regular(self, ridge: float, toward: Floats | float = 0.0) -> tuple[Floats, Floats]:
        """Both sides of the equations whose solution is the weights.

        Args:
            ridge: pull of the weights, in the unit of the evidence.
            toward: weights to which they are pulled, broadcast to :attr:`cross`.
        """
        gram = self.gram.copy()
        gram.flat[:: len(gram) + 1] += ridge
        return gram, self.cross + ridge * np.asarray(toward, self.cross.dtype)
