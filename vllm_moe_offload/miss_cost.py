"""What it costs, layer by layer, not to have an expert in the cache.

With prefetching a miss is no longer a miss: in the first layer, which nothing predicts, it
stalls for a whole read, in others for what is left of one, or not at all. So the same hit is
worth more in some layers than in others, and scores are weighted by what was measured
(GreedyDual's idea, Young 1994, with the cost of a layer in place of that of a page).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MEMORY = 0.995
"""Share of the older evidence that a step keeps: a few hundred steps count."""

FIRST_MISSES = 4.0
"""Misses of average cost that every layer is taken to have had before the first one."""

LEAST, MOST = 0.5, 2.0
"""Bounds of a layer's weight: one that hardly misses says little about what a miss costs."""


class MissCost:
    """Average stall per absent expert, by layer."""

    def __init__(self, num_layers: int) -> None:
        self._stall_ns: npt.NDArray[np.float64] = np.zeros(num_layers)
        self._absent: npt.NDArray[np.float64] = np.zeros(num_layers)

    def note(self, layer: int, stall_ns: float, num_absent: int) -> None:
        """A call of ``layer`` needed ``num_absent`` experts that the cache would not have had
        without prefetching, and waited ``stall_ns`` for them."""
        self._stall_ns[layer] += stall_ns
        self._absent[layer] += num_absent

    def end_step(self) -> None:
        """Older evidence fades."""
        self._stall_ns *= MEMORY
        self._absent *= MEMORY

    def relative(self) -> npt.NDArray[np.float32]:
        """float32 ``[layers]``: cost of a miss in each layer, 1 on average."""
        average = self._stall_ns.sum() / max(self._absent.sum(), 1.0)
        if not average:
            return np.ones(self._absent.size, np.float32)
        costs = (self._stall_ns + FIRST_MISSES * average) / (self._absent + FIRST_MISSES)
        return np.asarray(np.clip(costs / average, LEAST, MOST), np.float32)
