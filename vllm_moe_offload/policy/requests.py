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
        gain: float32 ``[rows]``, what each row adds per use: the later, the more.
    """

    keep: FloatArray
    gain: FloatArray

    @classmethod
    def of_step(
        cls, decay: float, steps: npt.NDArray[np.int64], age: npt.NDArray[np.int64]
    ) -> Decay:
        """Average that fades by ``decay`` per token.

        Args:
            decay: factor per token.
            steps: int64 ``[running]``, tokens that each request computes.
            age: int64 ``[rows]``, tokens of the same request behind each row.
        """
        keep = (decay**steps).astype(np.float32)[:, None]
        return cls(keep, ((1 - decay) * decay**age).astype(np.float32))

    def apply(self, average: FloatArray, where: Uses) -> None:
        """Moves ``average`` ``[running, keys]`` on by the step's uses, in place."""
        average *= self.keep
        np.add.at(average, where.index, self.gain[where.row])


@dataclass(frozen=True, slots=True)
class Uses:
    """Every (token, expert) pair of one or more layer calls.

    Attributes:
        index: running request and key of each pair, for indexing ``[running, keys]``.
        row: row of the step of each pair.
    """

    index: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
    row: npt.NDArray[np.int64]

    @classmethod
    def of_layers(
        cls, ids: npt.NDArray[np.int64], owner: npt.NDArray[np.int64], num_experts: int
    ) -> Uses:
        """Uses in ``ids`` ``[layers, rows, top_k]``; keys count from the first layer on."""
        layers, rows, top_k = ids.shape
        keys = ids + (np.arange(layers) * num_experts)[:, None, None]
        row = np.broadcast_to(np.arange(rows)[:, None], (layers, rows, top_k)).reshape(-1)
        return cls((owner[row], keys.reshape(-1)), row)


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
        match_at: int64 ``[rows]``, tokens at which the collection is asked again.
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
        self.match_at: npt.NDArray[np.int64] = np.zeros(8, np.int64)

    _ARRAYS = (
        "activity",
        "history",
        "slow",
        "value",
        "prior",
        "used",
        "trace",
        "tokens",
        "match_at",
    )

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
