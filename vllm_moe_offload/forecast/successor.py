"""What the running requests' recent routing says about their next tokens, learned online.

A request's state is its activation matrix with exponential forgetting (a few tokens). Its
*value* for an expert is the discounted number of its coming tokens that will use it,

    V(x_t)[e] = (1 - g) * sum over j >= 1 of g**(j - 1) * [token t + j uses e],

the successor representation (Dayan, 1993), and linear in the state: ``V(x) = x @ W + b``. W is
the ridge regression (``forecast/ridge.py``) over all tokens seen so far. What it holds is
co-activation across layers and time: "who used these experts lately uses those soon". A score
made of an expert's own history cannot know an expert that the request has not used yet.

Beyond :data:`DENSE_STATE` experts the state is a count sketch (see ``trace/sketches.py``)
of bounded width, so that W stays small.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.forecast.ridge import RidgeSums
from vllm_moe_offload.trace.sketches import count_sketch

FloatArray = npt.NDArray[np.float32]

DISCOUNT = np.float32(0.7)
"""Of the future, per token: ``g`` above."""
RIDGE = 40.0
"""Regularisation, in tokens of evidence."""
MEMORY_TOKENS = 50_000.0
"""Evidence kept; older routing fades, so that a shift is followed."""
DENSE_STATE = 1024
MAX_WEIGHTS = 1 << 22
MIN_TOKENS = 100
BATCH = 32
SOLVED_COLUMNS = 256
"""Experts per call for which the weights of a wide model are solved: all of them at once
would hold up a step for a quarter of a second at 6144 experts."""


class SuccessorModel:
    """Linear successor model of routing, shared by all requests.

    Attributes:
        weights: float32 ``[state_size, layers * experts]``; zero until learned.
        bias: float32 ``[layers * experts]``.
        num_tokens: tokens learned from.
        version: grows whenever ``weights`` change.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        size = num_layers * num_experts
        self.size = size
        self.dense = size <= DENSE_STATE
        self.state_size = size if self.dense else max(64, min(DENSE_STATE, MAX_WEIGHTS // size))
        if not self.dense:
            self.bucket, self.sign = count_sketch(size, self.state_size)
        width = self.state_size + 1  # the last input is the constant 1
        self.weights: FloatArray = np.zeros((self.state_size, size), np.float32)
        self.bias: FloatArray = np.zeros(size, np.float32)
        self._sums = RidgeSums(
            np.zeros((width, width), np.float32), np.zeros((width, size), np.float32)
        )
        self._states: FloatArray = np.ones((BATCH, width), np.float32)
        self._traces: FloatArray = np.zeros((BATCH, width), np.float32)
        self._used: FloatArray = np.zeros((BATCH, size), np.float32)
        self._filled = 0
        self._inverse: FloatArray | None = None  # a refit under way, its sums and its result
        self._fitted_cross: FloatArray = np.zeros((0, size), np.float32)
        self._solution: FloatArray = np.zeros((0, size), np.float32)
        self._solved = 0
        self.num_tokens = 0
        self._effective = 0.0
        self._next_solve = float(MIN_TOKENS)
        self.version = 0

    def add_uses(
        self,
        states: FloatArray,
        owner: npt.NDArray[np.int64],
        keys: npt.NDArray[np.int64],
        gain: FloatArray,
    ) -> None:
        """Adds uses to the states of their requests, in place.

        Args:
            states: ``[requests, state_size]``.
            owner: ``[uses]``, request of each use.
            keys: ``[uses]``, its ``layer * num_experts + expert``.
            gain: ``[uses]``, what it counts.
        """
        if self.dense:
            np.add.at(states, (owner, keys), gain)
        else:
            np.add.at(states, (owner, self.bucket[keys]), gain * self.sign[keys])

    def discount_traces(
        self, traces: FloatArray, states: FloatArray, indices: npt.NDArray[np.int64]
    ) -> None:
        """Takes the states of requests ``indices`` into their traces ``[requests, width]``."""
        discounted = traces[indices] * DISCOUNT
        discounted[:, :-1] += (1 - DISCOUNT) * states[indices]
        discounted[:, -1] += 1 - DISCOUNT
        traces[indices] = discounted

    def predict(self, states: FloatArray) -> FloatArray:
        """Values ``[n, layers * experts]`` of states ``[n, state_size]``."""
        return np.asarray(states @ self.weights + self.bias, np.float32)

    def learn(self, states: FloatArray, traces: FloatArray, used: FloatArray) -> None:
        """Takes in one token of each of n requests.

        Args:
            states: ``[n, state_size]`` after the token.
            traces: ``[n, state_size + 1]``, discounted states before it (constant last).
            used: ``[n, layers * experts]``, 1 for every expert that it used.
        """
        start, count = 0, len(states)
        while start < count:
            take = min(BATCH - self._filled, count - start)
            rows = slice(self._filled, self._filled + take)
            part = slice(start, start + take)
            self._states[rows, :-1] = states[part]
            self._traces[rows] = traces[part]
            self._used[rows] = used[part]
            self._filled += take
            start += take
            if self._filled == BATCH:
                self._sums.add(self._states.T @ self._states, self._traces.T @ self._used)
                self._filled = 0
        self.num_tokens += count
        self._effective += count
        if self._inverse is not None:
            self._solve_columns(self._inverse)
        elif self.num_tokens >= self._next_solve:
            self._refit()

    def _refit(self) -> None:
        """Refits W; ever more rarely, so that its cost stays a small share of all steps."""
        gram, cross = self._sums.regular(RIDGE)
        if self.dense:
            self._adopt(np.linalg.solve(gram, cross))
        else:
            self._inverse = np.asarray(np.linalg.inv(gram), np.float32)
            self._fitted_cross = np.asarray(cross, np.float32)
            self._solution = np.empty_like(self._fitted_cross)
            self._solved = 0
        self._next_solve = self.num_tokens + max(
            MIN_TOKENS if self.num_tokens < 1000 else 500,
            0.2 * min(self.num_tokens, MEMORY_TOKENS),
        )
        if self._effective > MEMORY_TOKENS:
            self._sums.fade(MEMORY_TOKENS / self._effective)
            self._effective = MEMORY_TOKENS

    def _solve_columns(self, inverse: FloatArray) -> None:
        """The next columns of a refit; the old weights hold until the last."""
        columns = slice(self._solved, self._solved + SOLVED_COLUMNS)
        self._solution[:, columns] = inverse @ self._fitted_cross[:, columns]
        self._solved += SOLVED_COLUMNS
        if self._solved >= self.size:
            self._adopt(self._solution)
            self._inverse = None

    def _adopt(self, solution: FloatArray) -> None:
        self.weights = np.ascontiguousarray(solution[:-1])
        self.bias = np.ascontiguousarray(solution[-1])
        self.version += 1
