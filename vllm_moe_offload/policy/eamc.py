"""MoE-Infinity's policy (arXiv 2401.14361), as the paper describes it: a baseline.

The published code differs from the paper: it never fills the collection, matches rows that
were not observed, evicts the hottest expert first, and lets the last request of a batch
overwrite the others. Here, each running request is matched by what was observed of it, all
requests count equally, and the least score goes first.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from vllm_moe_offload.policy.base import FloatArray, IdArray, PlannerRules, Policy, StepRows
from vllm_moe_offload.trace.activation import ActivationTracer
from vllm_moe_offload.trace.collection import ActivationCollection

DEFAULT_ENTRIES = 300
EPSILON = 1e-4


class EAMC(Policy):
    """Score = ``(p[l][e] + eps) * (1 - l / L)``; inserts every miss.

    ``p`` is the mean, over the running requests, of the row-normalised matrix of the
    finished request nearest to it, matched once per step.
    """

    name: ClassVar[str] = "eamc"
    rules: ClassVar[PlannerRules] = PlannerRules(admission=False)

    def __init__(
        self, num_layers: int, num_experts: int, entries: float = DEFAULT_ENTRIES
    ) -> None:
        """``entries``: capacity of the collection."""
        super().__init__(num_layers, num_experts)
        self.collection = ActivationCollection(num_layers, num_experts, int(entries))
        self._tracer = ActivationTracer(num_layers, num_experts)
        self._layer_weight = np.linspace(1.0, 1.0 / num_layers, num_layers, dtype=np.float32)[
            :, None
        ]
        self.scores[...] = EPSILON * self._layer_weight

    def begin_step(self, rows: StepRows) -> None:
        """Matches every running request by its counts so far."""
        super().begin_step(rows)
        self._tracer.begin_step(rows)
        predicted = np.zeros((self.num_layers, self.num_experts), np.float32)
        if len(self.collection):
            shape = (len(rows.requests), self.num_layers, self.num_experts)
            counts = np.empty(shape, np.float32)
            for index, request in enumerate(rows.requests):
                activation = self._tracer.get(request)
                assert activation is not None
                np.add(activation.prefill, activation.decode, out=counts[index])
            indices, _ = self.collection.nearest_each(counts)
            for entry in indices[indices >= 0]:
                predicted += self.collection.distribution(int(entry))
            predicted /= max(len(rows.requests), 1)
        np.multiply(predicted + np.float32(EPSILON), self._layer_weight, out=self.scores)

    def observe(self, layer: int, ids: IdArray, votes: FloatArray) -> None:
        """Counts the layer call for the requests that it belongs to."""
        self._tracer.observe(layer, ids)

    def end_request(self, request: str) -> None:
        """The request's matrix enters the collection and counts no more."""
        activation = self._tracer.end_request(request)
        if activation is not None:
            self.collection.add(activation.counts)
