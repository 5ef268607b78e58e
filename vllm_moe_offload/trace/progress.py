"""How far a request has come: which of its tokens are new, and which of those are prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(slots=True)
class RequestProgress:
    """Positions of one request that were computed.

    Each counts once. What lies below the high-water mark is computed again, after a preemption;
    and what a preempted request reads again of its own output is no prompt.

    Attributes:
        num_cached: positions below the first one computed (prefix cache), which never are.
        high_water: first position that was not computed yet.
        num_prefill: prompt tokens computed.
        num_decode: generated tokens computed.
    """

    num_cached: int
    high_water: int = 0
    num_prefill: int = 0
    num_decode: int = 0

    def advance(self, positions: npt.NDArray[np.int64], is_prefill: bool) -> tuple[int, bool]:
        """The request computes ``positions``, ascending; a step may have none of it.

        Returns:
            How many of them, from the front, were computed before; whether the others are
            prompt.
        """
        num_again = 0
        if positions.size and positions[0] < self.high_water:
            num_again = int(np.searchsorted(positions, self.high_water))
        num_new = positions.size - num_again
        if num_new:
            self.high_water = int(positions[-1]) + 1
        is_prompt = is_prefill and not self.num_decode
        if is_prompt:
            self.num_prefill += num_new
        else:
            self.num_decode += num_new
        return num_again, is_prompt
