"""Router lookahead: the next layers' own routers, asked early.

A residual stream changes little from layer to layer, so the router of layer l + d, given what
the router of layer l was given, mostly names the experts that it will name d layers later.
The idea is that of Eliseev & Mazur (arXiv 2312.17238).

How far such a guess is to be trusted is measured while it is used. A guess is described by

* how many layers ahead it was made,
* its margin: how far the expert's logit lies above the middle between the last expert that
  the router would choose and the first that it would not, in standard deviations of the
  token's logits,
* whether the expert was absent from the cache: what was not used lately is guessed right
  less often, and is all that prefetching is about.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vllm_moe_offload.cache import ExpertCache
from vllm_moe_offload.native import check, core
from vllm_moe_offload.policy.base import IdArray, StepRows
from vllm_moe_offload.predictor import LIKELY, Predictor

FloatArray = npt.NDArray[np.float32]

MAX_ROWS = 64
"""Rows of a step that the routers are asked about; of longer ones, a sample that is spread
evenly. So many tokens use most experts anyway, and the sample names them."""

NUM_BINS = 16
"""Bins of margins, a quarter of a standard deviation each, as ``csrc/lookahead.h`` has them:
from -2 to 2 standard deviations; what lies beyond counts as these."""

FIRST_GUESSES = 16.0
"""Guesses of every kind that are taken as made before the first one: those with a margin
above 0 right in 3 of 4 cases, the others never."""

MEMORY = 0.995
"""Share of the older evidence that a step keeps: a few hundred steps count."""


@dataclass(frozen=True, slots=True)
class Routers:
    """The routers of all MoE layers, which are linear: logits = hidden @ weight.T + bias.

    Copies of their own: the routers of the next few layers are asked in one multiplication,
    where asking the model's modules one by one would take longer than predicting may.

    Attributes:
        weight: ``[layers, experts, hidden]``.
        bias: ``[layers, experts]`` or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def logits(self, hidden: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """float32 ``[rows, (end - begin) * experts]`` of layers ``[begin, end)``.

        ``hidden``: ``[rows, hidden]`` of any float type.
        """
        weight = self.weight[begin:end].flatten(0, 1)
        found = hidden.to(weight.dtype) @ weight.T
        if self.bias is not None:
            found += self.bias[begin:end].flatten()
        return found.float()


class RouterLookahead(Predictor):
    """Predicts with the model's routers.

    Attributes:
        depth: layers ahead that it may be asked for.
    """

    def __init__(self, routers: Routers, top_k: int, depth: int) -> None:
        """``top_k`` must be less than the number of experts."""
        self.depth = depth
        self.num_layers, self.num_experts, _ = routers.weight.shape
        num_experts = self.num_experts
        self._routers = routers
        self._top_k = top_k
        shape = (depth, 2, NUM_BINS)
        self._tried: FloatArray = np.full(shape, FIRST_GUESSES, np.float32)
        first = np.where(np.arange(NUM_BINS) >= NUM_BINS // 2, 0.75, 0.0)
        self._right: FloatArray = (self._tried * first).astype(np.float32)
        self._trust: FloatArray = self._right / self._tried
        self._trust_at = [table.ctypes.data for table in self._trust]
        self._experts: npt.NDArray[np.int32] = np.zeros(num_experts, np.int32)
        self._chances: FloatArray = np.zeros(num_experts, np.float32)
        self._all_kinds: npt.NDArray[np.uint8] = np.zeros((depth, 0, num_experts), np.uint8)
        self._reads: npt.NDArray[np.int32] = np.zeros((0, 3), np.int32)
        self._num_asked: npt.NDArray[np.int32] = np.zeros(1, np.int32)
        self._results_at: list[int] = []
        self._active = False
        self._num_rows = 0
        self._sample: slice | npt.NDArray[np.int64] = slice(0)
        self._num_steps = 0
        # Kinds of the guesses about one layer, by distance: what they were like is compared
        # with what came. One layer per step is enough, and costs next to nothing.
        self._watched = 0
        self._kinds: list[npt.NDArray[np.uint8] | None] = [None] * depth

    @property
    def trust(self) -> FloatArray:
        """float32 ``[depth, 2, bins]``: how often guesses of each kind were right.

        By layers ahead (from 1), resident or absent, and margin.
        """
        return self._trust

    def begin_step(self, rows: StepRows) -> None:
        """A step begins."""
        count = rows.request_of_row.size
        self._active = True
        self._num_rows = min(count, MAX_ROWS)
        self._sample = slice(count)
        if count > MAX_ROWS:
            self._sample = np.arange(MAX_ROWS) * count // MAX_ROWS
        self._kinds = [None] * self.depth
        self._num_steps += 1
        self._watched = self._num_steps % self.num_layers

    def observe(self, layer: int, ids: IdArray) -> None:
        """Layer ``layer`` routed the step's rows, ids ``[rows, top_k]``: was the guess right?"""
        if layer != self._watched or not self._active:
            return
        used = np.ascontiguousarray(ids[self._sample], np.int64)
        self._tried *= MEMORY
        self._right *= MEMORY
        for distance, kinds in enumerate(self._kinds):
            if kinds is None:
                continue
            check(
                core.vmo_judge(
                    kinds.ctypes.data,
                    self._num_rows,
                    self.num_experts,
                    used.ctypes.data,
                    used.shape[1],
                    self._tried[distance].ctypes.data,
                    self._right[distance].ctypes.data,
                )
            )
        np.divide(self._right, self._tried, out=self._trust)

    def predict(
        self,
        layer: int,
        ahead: int,
        hidden: torch.Tensor | None,
        slots: npt.NDArray[np.int32],
        threshold: float,
    ) -> list[tuple[int, float]] | None:
        """See :meth:`Predictor.predict`."""
        target = layer + ahead
        if not self._active or hidden is None or target >= self.num_layers:
            return None
        logits = self._routers.logits(hidden[self._sample], target, target + 1)
        kinds = np.empty((self._num_rows, self.num_experts), np.uint8)
        if target == self._watched:
            self._kinds[ahead - 1] = kinds
        count = check(
            core.vmo_look_ahead(
                logits.data_ptr(),
                self._num_rows,
                logits.shape[1],
                self.num_experts,
                self._top_k,
                slots.ctypes.data,
                self._trust_at[ahead - 1],
                threshold,
                kinds.ctypes.data,
                self._experts.ctypes.data,
                self._chances.ctypes.data,
            )
        )
        experts, chances = self._experts[:count].tolist(), self._chances[:count].tolist()
        return list(zip(experts, chances, strict=True))

    def foresee(
        self,
        layer: int,
        hidden: torch.Tensor | None,
        cache: ExpertCache,
        value: float,
        max_reads: int,
    ) -> list[list[int]]:
        """See :meth:`Predictor.foresee`: the same in one multiplication and one call."""
        first, end = layer + 1, min(layer + 1 + self.depth, self.num_layers)
        if not self._active or hidden is None or first == end:
            return []
        logits = self._routers.logits(hidden[self._sample], first, end)
        self._make_room(max_reads)
        count = check(
            core.vmo_planner_foresee(
                cache.handle,
                logits.data_ptr(),
                self._num_rows,
                logits.shape[1],
                first,
                end - first,
                self._top_k,
                self._trust_at[0],
                LIKELY,
                value,
                max_reads,
                *self._results_at,
            )
        )
        distance = self._watched - first
        if 0 <= distance < self._num_asked[0]:
            self._kinds[distance] = self._all_kinds[distance].copy()
        reads: list[list[int]] = self._reads[:count].tolist() if count else []
        return reads

    def _make_room(self, max_reads: int) -> None:
        """For the results of :meth:`foresee`."""
        if len(self._reads) >= max_reads and self._all_kinds.shape[1] == self._num_rows:
            return
        shape = (self.depth, self._num_rows, self.num_experts)
        self._all_kinds = np.empty(shape, np.uint8)
        self._reads = np.zeros((max(max_reads, len(self._reads)), 3), np.int32)
        results = (self._all_kinds, self._reads, self._num_asked)
        self._results_at = [array.ctypes.data for array in results]

    def end_step(self) -> None:
        """All layers of the step ran."""
        self._active = False

    def end_request(self, request: str) -> None:
        """Nothing is kept per request."""
        del request
