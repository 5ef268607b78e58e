"""State of the running requests, as rows of arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.policy.base import FloatArray


@dataclass(frozen=True, slots=True)
class Decay:
    """One exponential average in one step.

    Attributes:
        keep: float32 ``[running, 1]``, factor on the old average.
        gain: what a request's only row adds per use.
        row_gain: float64 ``[rows]``, what each row adds per use otherwise.
    """

    keep: FloatArray
    gain: np.float32
    row_gain: npt.NDArray[np.float64]

    def gain_of(
        self,
        used: npt.NDArray[np.int64] | None,
        keys: npt.NDArray[np.int64],
        top_k: int,
        like: FloatArray,
    ) -> FloatArray:
        """What a layer call adds, shaped ``like`` the average."""
        if used is not None:
            return used * self.gain
        added = np.bincount(keys, np.repeat(self.row_gain, top_k), like.size)
        return added.reshape(like.shape).astype(np.float32)


class RunningRequests:
    """Per-request rows in arrays that grow, without holes: row i is ``order[i]``'s.

    A request that ends leaves its row to the last one, so that nothing of it counts on.

    Attributes:
        order: the requests by row.
        row_of: row by request.
        activity: float32 ``[rows, size]``, fast average of what the request used.
        history: the same, slower.
        slow: the same, slowest.
        value: forecast of the successor model.
        prior: forecast of the collection.
        used: 1 for what the step's token used.
        trace: float32 ``[rows, width]``, discounted earlier states.
        tokens: int64 ``[rows]``, tokens computed.
    """

    def __init__(self, size: int, width: int) -> None:
        self.order: list[str] = []
        self.row_of: dict[str, int] = {}
        self.activity: FloatArray = np.zeros((8, size), np.float32)
        self.history: FloatArray = np.zeros((8, size), np.float32)
        self.slow: FloatArray = np.zeros((8, size), np.float32)
        self.value: FloatArray = np.zeros((8, size), np.float32)
        self.prior: FloatArray = np.zeros((8, size), np.float32)
        self.used: FloatArray = np.zeros((8, size), np.float32)
        self.trace: FloatArray = np.zeros((8, width), np.float32)
        self.tokens: npt.NDArray[np.int64] = np.zeros(8, np.int64)

    _ARRAYS = ("activity", "history", "slow", "value", "prior", "used", "trace", "tokens")

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

    def remove(self, request: str) -> None:
        """Forgets a request."""
        row, last = self.row_of.pop(request), len(self.order) - 1
        if row != last:
            for name in self._ARRAYS:
                array = getattr(self, name)
                array[row] = array[last]
            self.order[row] = self.order[last]
            self.row_of[self.order[row]] = row
        self.order.pop()
