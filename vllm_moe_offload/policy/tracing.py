"""What ``--moe-offload=trace`` serves with in this version: LRFU scores, requests traced.

Every running request has its activation matrices (prefill and decode apart), right under
continuous batching, chunked prefill, preemption and prefix caching; a request that ends
leaves. The policies that predict from them are :mod:`vllm_moe_offload.policy.trace`, which
replay runs and serving does not yet: they cost more per layer than a layer call may.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from vllm_moe_offload.policy.base import FloatArray, IdArray, StepRows
from vllm_moe_offload.policy.lrfu import LRFU
from vllm_moe_offload.trace.activation import ActivationTracer


class TracingLRFU(LRFU):
    """LRFU, and an :class:`ActivationTracer` fed once per step.

    Attributes:
        tracer: activation matrices of the running requests.
    """

    name: ClassVar[str] = "trace"

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        self.tracer = ActivationTracer(num_layers, num_experts)
        self._step_ids = np.zeros((num_layers, 0, 0), np.int32)
        self._layers_seen = 0

    def begin_step(self, rows: StepRows) -> None:
        """See :meth:`Policy.begin_step`."""
        super().begin_step(rows)
        self._layers_seen = 0

    def observe(self, layer: int, ids: IdArray, votes: FloatArray) -> None:
        """LRFU's update; the ids are kept for the end of the step."""
        super().observe(layer, ids, votes)
        if self._step_ids.shape[1:] != ids.shape:
            self._step_ids = np.zeros((self.num_layers, *ids.shape), np.int32)
        self._step_ids[layer] = ids
        self._layers_seen += 1

    def end_step(self) -> None:
        """Counts the step; one that broke off between layers is dropped."""
        if self._layers_seen == self.num_layers:
            self.tracer.begin_step(self.rows)
            self.tracer.observe_step(self._step_ids)

    def end_request(self, request: str) -> None:
        """The request's matrices leave at once."""
        self.tracer.end_request(request)
