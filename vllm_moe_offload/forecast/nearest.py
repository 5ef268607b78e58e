"""The finished requests that running ones are most like: MoE-Infinity's forecast (arXiv 2401.14361).

The published code differs from the paper: it never fills the collection, matches layers that
were not observed, and lets the last request of a batch overwrite the others. Here, each running
request is matched by what was observed of it, and all requests count equally.
"""

from __future__ import annotations

import numpy as np

from vllm_moe_offload.step import FloatArray, IdArray, StepTokens
from vllm_moe_offload.trace.activation import ExpertTracer
from vllm_moe_offload.trace.collection import ActivationCollection


class NearestRequests:
    """Activation matrices of running requests, matched with those of finished ones once a step.

    Attributes:
        collection: matrices of finished requests.
    """

    def __init__(self, num_layers: int, num_experts: int, entries: int) -> None:
        """``entries``: capacity of the collection."""
        self.collection = ActivationCollection(num_layers, num_experts, entries)
        self._tracer = ExpertTracer(num_layers, num_experts)
        self._shape = (num_layers, num_experts)

    def begin_step(self, tokens: StepTokens) -> FloatArray:
        """Expected use, float32 ``[layers, experts]``; a layer sums to 1, or to 0 without evidence.

        The mean, over the running requests, of the row-normalised matrix of the finished request
        nearest to each one's counts so far.
        """
        self._tracer.begin_step(tokens)
        predicted = np.zeros(self._shape, np.float32)
        if len(self.collection):
            counts = np.empty((len(tokens.requests), *self._shape), np.float32)
            for index, request in enumerate(tokens.requests):
                activation = self._tracer.get(request)
                assert activation is not None
                np.add(activation.prefill, activation.decode, out=counts[index])
            indices, _ = self.collection.nearest_each(counts)
            for entry in indices[indices >= 0]:
                predicted += self.collection.distribution(int(entry))
            predicted /= max(len(tokens.requests), 1)
        return predicted

    def observe(self, layer: int, ids: IdArray) -> None:
        """Counts the layer call for the requests that it belongs to; ids ``[tokens, top_k]``."""
        self._tracer.observe(layer, ids)

    def end_request(self, request: str) -> None:
        """The request's matrix enters the collection and counts no more."""
        activation = self._tracer.end_request(request)
        if activation is not None:
            self.collection.add(activation.counts)
