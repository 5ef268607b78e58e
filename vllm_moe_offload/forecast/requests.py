"""State of the running requests, in arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.step import FloatArray


class RunningRequests:
    """Arrays that grow, an index per running request, without holes.

    A request that ends leaves its index to the last one, so that nothing of it counts on.

    Attributes:
        order: the requests by index.
        index_of: index by request.
        state: float32 ``[requests, width]``, the successor model's view of what was used lately.
        trace: float32 ``[requests, width + 1]``, discounted earlier states (constant last).
        tokens: int64 ``[requests]``, tokens computed.
    """

    def __init__(self, width: int) -> None:
        self.order: list[str] = []
        self.index_of: dict[str, int] = {}
        self.state: FloatArray = np.zeros((8, width), np.float32)
        self.trace: FloatArray = np.zeros((8, width + 1), np.float32)
        self.tokens: npt.NDArray[np.int64] = np.zeros(8, np.int64)

    _ARRAYS = ("state", "trace", "tokens")

    def __len__(self) -> int:
        return len(self.order)

    def add(self, request: str) -> int:
        """Index for a new request, all zero."""
        index = len(self.order)
        if index == len(self.tokens):
            for name in self._ARRAYS:
                array = getattr(self, name)
                setattr(self, name, np.concatenate([array, np.zeros_like(array)]))
        self.order.append(request)
        self.index_of[request] = index
        for name in self._ARRAYS:
            getattr(self, name)[index] = 0
        return index

    def remove(self, request: str) -> tuple[int, int]:
        """Forgets a request; returns the index of the one that took its place, and that place."""
        index, last = self.index_of.pop(request), len(self.order) - 1
        if index != last:
            for name in self._ARRAYS:
                array = getattr(self, name)
                array[index] = array[last]
            self.order[index] = self.order[last]
            self.index_of[self.order[index]] = index
        self.order.pop()
        return last, index
