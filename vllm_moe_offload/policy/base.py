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
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from vllm_moe_offload.cache.planner import ExpertCache, PlannerRules
from vllm_moe_offload.native import Observer, core
from vllm_moe_offload.step import FloatArray, IdArray, StepTokens


class Policy(ABC):
    """Base of all policies. One instance serves one cache.

    The calls of one step, in order: :meth:`begin_step`; :meth:`observe` before each layer
    is planned; :meth:`end_step`. :meth:`end_request` when a request will never run again.
    Before either, :meth:`verify` where a drafter guesses tokens. Between begin and end of a
    step, :meth:`catch_up` once, as soon as there is time.
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

    def bind(self, cache: ExpertCache) -> None:
        """Makes the scores of ``cache`` the table that this policy writes.

        The cache may have more layers than the policy: a drafter's, behind the model's, which
        another one scores.
        """
        rows = cache.scores[: self.num_layers]
        rows[...] = self.scores
        self.scores = rows

    def begin_step(self, tokens: StepTokens) -> None:
        """A step of the model begins."""
        self.tokens = tokens

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
            ids: ``[tokens, top_k]`` expert ids.
            votes: float32 ``[num_experts]``, per expert the sum of ``StepTokens.weights`` of
                the tokens that chose it.
        """

    def native_observer(self, num_tokens: int, top_k: int) -> int:
        """Address of an ``Observer`` (``csrc/serving.h``) that takes the step's layer calls in.

        A policy that has one need not be told of each layer call by :meth:`observe`. Asked
        at a step's first layer call; ``num_tokens`` and ``top_k`` are those of the step.

        Returns:
            0 if this policy has none, or not now.
        """
        del num_tokens, top_k
        return 0

    def end_step(self) -> None:
        """All layers of the step ran."""

    def verify(self, ends: Mapping[str, int]) -> None:
        """Says which of the last step's drafted tokens are their requests'.

        Args:
            ends: see :meth:`StepTokens.is_verified`.
        """
        del ends

    def end_request(self, request: str) -> None:
        """``request`` ended: it must stop counting."""
        del request


def fade_and_gain(observer: Observer, layer: int, num_experts: int) -> None:
    """Moves one layer's scores by its votes, as ``observer`` says (``csrc/follow.h``).

    The rule by which a layer call changes scores, for those that observe in Python.
    """
    begin_bytes = layer * num_experts * 4
    core.vmo_follow(
        observer.scores + begin_bytes,
        observer.votes + begin_bytes,
        observer.fade + begin_bytes if observer.fade else None,
        ctypes.c_float.from_address(observer.gains + 4 * layer).value,
        observer.decay,
        num_experts,
    )
