"""State of the running requests, as rows of arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.step import FloatArray


class RunningRequests:
    """Per-request rows in arrays that grow, without holes: row i is ``order[i]``'s.

    A request that ends leaves its row to the last one, so that nothing of it counts on.

    Attributes:
        order: the requests by row.
        row_of: row by request.
        state: float32 ``[rows, width]``, the successor model's view of what was used lately.
        trace: float32 ``[rows, width + 1]``, discounted earlier states (constant last).
        tokens: int64 ``[rows]``, tokens computed.
    """

    def __init__(self, width: int) -> None:
        self.order: list[str] = []
        self.row_of: dict[str, int] = {}
        self.state: FloatArray = np.zeros((8, width), np.float32)
        self.trace: FloatArray = np.zeros((8, width + 1), np.float32)
        self.tokens: npt.NDArray[np.int64] = np.zeros(8, np.int64)

    _ARRAYS = ("state", "trace", "tokens")

    def __len__(self) -> int:
        return len(self.order)

    def add(self, request: str) -> int:
        """Row for a new request, all zero."""
        row = len(self.order)
        if row == len(self.tokens):
            for name in self._ARRAYS:
                array = getattr(self, name)
                setattr(self, name, np.concatenate([array, np.zeros_like(array)]))
        self.order.append(request)
        self.row_of[request] = row
        for name in self._ARRAYS:
            getattr(self, name)[row] = 0
        return row

    def remove(self, request: str) -> tuple[int, int]:
        """Forgets a request; returns the row that took its row's place, and its row."""
        row, last = self.row_of.pop(request), len(self.order) - 1
        if row != last:
            for name in self._ARRAYS:
                array = getattr(self, name)
                array[row] = array[last]
            self.order[row] = self.order[last]
            self.row_of[self.order[row]] = row
        self.order.pop()
        return last, row
