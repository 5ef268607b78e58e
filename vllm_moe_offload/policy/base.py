"""What a policy is: something that writes the keep-score table from which the core plans.

A policy never sees slots or bytes. It observes the routing of every layer call before that
call is planned, and writes ``scores[layer, expert]``: how much keeping that expert is worth
(Jim Gray's rule of thumb made explicit: the probability that it is used soon). The C++ core
(``csrc/planner.h``) evicts the least score and, with admission, lets a miss replace a
resident only if it scores higher.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.native import GAIN_BY_VOTES, SCORES_STAY, Observer

IdArray = npt.NDArray[np.integer[Any]]
FloatArray = npt.NDArray[np.float32]

ORDER_SCORE, ORDER_RECENCY = 0, 1
SCOPE_GLOBAL, SCOPE_PER_LAYER = 0, 1


@dataclass(frozen=True, slots=True)
class PlannerRules:
    """How the core chooses victims for a policy.

    Attributes:
        order: :data:`ORDER_SCORE` (least score first) or :data:`ORDER_RECENCY`.
        scope: :data:`SCOPE_GLOBAL`, or :data:`SCOPE_PER_LAYER` (equal share per layer).
        admission: a miss replaces a resident only if its score is higher.
    """

    order: int = ORDER_SCORE
    scope: int = SCOPE_GLOBAL
    admission: bool = True


@dataclass(slots=True)
class StepRows:
    """Which token rows of the running step belong to which request.

    Attributes:
        requests: identifiers of the requests in the step, one per request.
        request_of_row: int32 ``[rows]``, index into ``requests``.
        positions: int64 ``[rows]``, position of the token in its request.
        is_prefill: bool ``[requests]``, whether the request is still reading its prompt.
        weights: float32 ``[rows]``; a request's rows share one vote, so that a prefill
            chunk of 512 tokens weighs as much as a decode token:
            ``1 / (rows of the request) / (requests in the step)``.
    """

    requests: Sequence[str]
    request_of_row: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int64]
    is_prefill: npt.NDArray[np.bool_]
    weights: FloatArray

    @classmethod
    def of_lengths(
        cls,
        requests: Sequence[str],
        lengths: npt.NDArray[np.integer[Any]],
        first_positions: npt.NDArray[np.integer[Any]],
        is_prefill: npt.NDArray[np.bool_],
    ) -> StepRows:
        """Rows of a step in which request i computes ``lengths[i]`` tokens in a row."""
        count = len(requests)
        lengths = np.asarray(lengths, np.int64)
        request_of_row = np.repeat(np.arange(count, dtype=np.int32), lengths)
        starts = np.cumsum(lengths) - lengths
        offsets = np.arange(request_of_row.size, dtype=np.int64) - starts[request_of_row]
        positions = np.asarray(first_positions, np.int64)[request_of_row] + offsets
        share = 1.0 / (np.maximum(lengths, 1) * max(count, 1))
        return cls(
            requests,
            request_of_row,
            positions,
            is_prefill,
            share.astype(np.float32)[request_of_row],
        )


class Policy(ABC):
    """Base of all policies. One instance serves one cache.

    The calls of one step, in order: :meth:`begin_step`; :meth:`observe` before each layer
    is planned; :meth:`end_step`. :meth:`end_request` when a request will never run again.
    Between begin and end of a step, :meth:`catch_up` once, as soon as there is time.
    """

    name: ClassVar[str]
    rules: ClassVar[PlannerRules]

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_layers = num_layers
        self.num_experts = num_experts
        self.scores: FloatArray = np.zeros((num_layers, num_experts), np.float32)

    @property
    def full_score(self) -> float:
        """Score of an expert that every request uses at every step, on this policy's scale."""
        return 1.0

    def bind(self, scores: FloatArray) -> None:
        """Makes ``scores`` (the cache's table) the one that this policy writes."""
        scores[...] = self.scores
        self.scores = scores

    def begin_step(self, rows: StepRows) -> None:
        """A step of the model begins."""
        self.rows = rows

    def catch_up(self) -> None:
        """Learns from the step before and refreshes all scores, if that was put off.

        Serving calls it where it waits for a read anyway, and :meth:`end_step` does if nobody
        else did. Until then scores follow the layer calls alone.
        """

    @abstractmethod
    def observe(self, layer: int, ids: IdArray, votes: FloatArray) -> None:
        """Layer ``layer`` routed this step's tokens; called before it is planned.

        Args:
            layer: index among the MoE layers.
            ids: ``[rows, top_k]`` expert ids.
            votes: float32 ``[num_experts]``, per expert the sum of ``StepRows.weights`` of
                the rows that chose it.
        """

    def native_observer(self, num_rows: int, top_k: int) -> int:
        """Address of an ``Observer`` (``csrc/serving.h``) that takes the step's layer calls in.

        A policy that has one need not be told of each layer call by :meth:`observe`. Asked
        at a step's first layer call; ``num_rows`` and ``top_k`` are those of the step.

        Returns:
            0 if this policy has none, or not now.
        """
        del num_rows, top_k
        return 0

    def end_step(self) -> None:
        """All layers of the step ran."""

    def end_request(self, request: str) -> None:
        """``request`` ended: it must stop counting."""
        del request


class PlainPolicy(Policy):
    """A policy whose scores fade by a factor and gain by votes, layer call by layer call.

    That is little enough for the core to do by itself: in serving (``vmo_observer``), and in
    shadows that run beside another policy (``vmo_planner_drive``).

    Attributes:
        follows: what scores gain: ``native.SCORES_STAY``, nothing; ``GAIN_BY_VOTES``, the
            votes; ``GAIN_BY_USES``, one per layer call, however many tokens chose the expert.
        decay: factor on a layer's scores at each of its calls.
    """

    follows: ClassVar[int]

    def __init__(self, num_layers: int, num_experts: int, decay: float = 1.0) -> None:
        super().__init__(num_layers, num_experts)
        self.decay = decay
        self._votes: FloatArray = np.zeros((num_layers, num_experts), np.float32)
        self._gains: FloatArray = np.ones(num_layers, np.float32)
        self._observer = Observer(
            votes=self._votes.ctypes.data,
            scores=self.scores.ctypes.data,
            gains=self._gains.ctypes.data,
            decay=decay,
            follows=self.follows,
        )

    def bind(self, scores: FloatArray) -> None:
        """See :meth:`Policy.bind`; ``scores`` must be contiguous."""
        super().bind(scores)
        self._observer.scores = scores.ctypes.data

    def gain(self, votes: FloatArray) -> FloatArray | None:
        """What scores gain by ``votes`` ``[..., num_experts]``; None if they never change."""
        if self.follows == SCORES_STAY:
            return None
        return votes if self.follows == GAIN_BY_VOTES else (votes > 0).astype(np.float32)

    def native_observer(self, num_rows: int, top_k: int) -> int:
        """See :meth:`Policy.native_observer`."""
        self._observer.ids_per_layer = num_rows * top_k
        return ctypes.addressof(self._observer)

    def observe(self, layer: int, ids: IdArray, votes: FloatArray) -> None:
        """Fades the layer's scores and adds this call's gain."""
        gain = self.gain(votes)
        if gain is not None:
            row = self.scores[layer]
            row *= self.decay
            row += gain
