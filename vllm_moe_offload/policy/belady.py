"""Belady's bound (Belady, 1966): evict what is used again last. Replay only.

With bypass (a miss that is used again later than every resident is not kept) and without
pinning, so that no policy that serves can beat it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.cache.planner import PlannerRules
from vllm_moe_offload.policy.base import Policy
from vllm_moe_offload.step import FloatArray, IdArray, StepTokens

NEVER = np.float32(-3e38)
"""Score of an expert that is not used again."""


class Belady(Policy):
    """Score = minus the number of the layer call that uses the expert next.

    Scores are float32, so calls are told apart exactly up to 2**24 of them; beyond that,
    neighbours tie.
    """

    name: ClassVar[str] = "belady"
    rules: ClassVar[PlannerRules] = PlannerRules(admission=True)

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        self._next: FloatArray | None = None
        self._offsets: npt.NDArray[np.int64] = np.zeros(1, np.int64)
        self._step = -1
        self.scores[...] = NEVER

    def foresee(
        self, offsets: npt.NDArray[np.int64], ids: npt.NDArray[np.integer[Any]]
    ) -> None:
        """Tells the future.

        Args:
            offsets: int64 ``[steps + 1]``; step i computes tokens ``offsets[i]:offsets[i + 1]``.
            ids: ``[tokens, layers, top_k]`` of all steps.
        """
        num_steps = offsets.size - 1
        tokens, layers, top_k = ids.shape
        step_of = np.repeat(np.arange(num_steps, dtype=np.int64), np.diff(offsets) * top_k)
        upcoming = np.full((tokens, layers, top_k), NEVER, np.float32)
        for layer in range(layers):
            expert = np.ascontiguousarray(ids[:, layer]).reshape(-1).astype(np.int64)
            uses, use_of = np.unique(expert * num_steps + step_of, return_inverse=True)
            step = uses % num_steps
            same = uses[:-1] // num_steps == uses[1:] // num_steps
            following = np.full(uses.size, NEVER, np.float32)
            following[:-1][same] = -(step[1:][same] * layers + layer)
            upcoming[:, layer] = following[use_of].reshape(tokens, top_k)
        self._next = upcoming
        self._offsets = offsets
        self._step = -1

    def begin_step(self, tokens: StepTokens) -> None:
        """Moves on to the next foreseen step."""
        super().begin_step(tokens)
        self._step += 1

    def observe(self, layer: int, ids: IdArray, votes: FloatArray) -> None:
        """Writes when this call's experts are used next.

        Raises:
            RuntimeError: :meth:`foresee` was not called: nobody knows the future.
        """
        if self._next is None:
            raise RuntimeError("belady is a bound for replays; it cannot serve")
        begin, end = self._offsets[self._step], self._offsets[self._step + 1]
        self.scores[layer, ids] = self._next[begin:end, layer]
