"""MoE-Infinity's policy (arXiv 2401.14361), as the paper describes it: a baseline.

The published code evicts the hottest expert first; here the least score goes first. What it
expects: ``forecast/nearest.py``.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from vllm_moe_offload.cache.planner import PlannerRules
from vllm_moe_offload.forecast.nearest import NearestRequests
from vllm_moe_offload.policy.base import Policy
from vllm_moe_offload.step import FloatArray, IdArray, StepTokens

DEFAULT_ENTRIES = 300
EPSILON = 1e-4


class EAMC(Policy):
    """Score = ``(p[l][e] + eps) * (1 - l / L)``; inserts every miss.

    Attributes:
        nearest: gives ``p``.
    """

    name: ClassVar[str] = "eamc"
    rules: ClassVar[PlannerRules] = PlannerRules(admission=False)

    def __init__(
        self, num_layers: int, num_experts: int, entries: float = DEFAULT_ENTRIES
    ) -> None:
        """``entries``: capacity of the collection."""
        super().__init__(num_layers, num_experts)
        self.nearest = NearestRequests(num_layers, num_experts, int(entries))
        self._layer_weight = np.linspace(1.0, 1.0 / num_layers, num_layers, dtype=np.float32)[
            :, None
        ]
        self.scores[...] = EPSILON * self._layer_weight

    def begin_step(self, tokens: StepTokens) -> None:
        """Matches every running request by its counts so far."""
        super().begin_step(tokens)
        predicted = self.nearest.begin_step(tokens)
        np.multiply(predicted + np.float32(EPSILON), self._layer_weight, out=self.scores)

    def observe(self, layer: int, ids: IdArray, votes: FloatArray) -> None:
        """Counts the layer call for the requests that it belongs to."""
        self.nearest.observe(layer, ids)

    def end_request(self, request: str) -> None:
        """The request's matrix enters the collection and counts no more."""
        self.nearest.end_request(request)
