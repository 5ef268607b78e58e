"""Expert activation matrices of the running requests (MoE-Infinity's EAM, per request).

``M[l, e]`` counts the tokens of one request that layer l routed to expert e, prefill and
decode apart. Each position counts once (``trace/progress.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.native import NO_EXPERT
from vllm_moe_offload.step import StepTokens
from vllm_moe_offload.trace.progress import RequestProgress

Counts = npt.NDArray[np.float32]


@dataclass(slots=True)
class Activation:
    """What one request activated so far.

    Attributes:
        prefill: float32 ``[layers, experts]``, counts of its prompt tokens.
        decode: float32 ``[layers, experts]``, counts of its generated tokens.
        progress: which tokens these are.
    """

    prefill: Counts
    decode: Counts
    progress: RequestProgress

    @property
    def counts(self) -> Counts:
        """Prefill and decode together."""
        return self.prefill + self.decode


class ExpertTracer:
    """Activation matrices of every running request.

    Memory is two float32 matrices per running request; a finished one leaves at once.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_layers = num_layers
        self.num_experts = num_experts
        self._running: dict[str, Activation] = {}
        self._step: list[Activation] = []
        self._fresh: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._all_fresh = True
        self._keys: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._counts: list[Counts] = []

    def __len__(self) -> int:
        return len(self._running)

    def get(self, request: str) -> Activation | None:
        """The request's matrices, or None if none of its tokens ran."""
        return self._running.get(request)

    def begin_step(self, tokens: StepTokens) -> None:
        """Decides which tokens of the step are new, and whose they are."""
        self._step = []
        self._counts = []
        fresh = np.ones(tokens.positions.size, np.bool_)
        ends = np.cumsum(
            np.bincount(tokens.request_of_token, minlength=len(tokens.requests))
        ).tolist()
        start = 0
        for request, end, is_prefill in zip(
            tokens.requests, ends, tokens.is_prefill.tolist(), strict=True
        ):
            activation = self._running.get(request)
            if activation is None:
                first = int(tokens.positions[start]) if end > start else 0
                prefill, decode = np.zeros((2, self.num_layers, self.num_experts), np.float32)
                activation = Activation(prefill, decode, RequestProgress(first))
                self._running[request] = activation
            num_again, is_prompt = activation.progress.advance(
                tokens.positions[start:end], is_prefill
            )
            fresh[start : start + num_again] = False
            self._counts.append(activation.prefill if is_prompt else activation.decode)
            self._step.append(activation)
            start = end
        self._fresh = fresh
        self._all_fresh = bool(fresh.all())
        self._keys = tokens.request_of_token.astype(np.int64) * self.num_experts

    def observe(self, layer: int, ids: npt.NDArray[np.integer[Any]]) -> None:
        """Counts one layer call; ids ``[tokens, top_k]`` in the tokens of :meth:`begin_step`."""
        keys = self._keys[:, None] + ids
        is_counted = ids != NO_EXPERT
        if not self._all_fresh:
            is_counted &= self._fresh[:, None]
        keys = keys[is_counted]
        size = len(self._counts) * self.num_experts
        counted = np.bincount(keys.reshape(-1), minlength=size)
        for counts, row in zip(
            self._counts, counted.reshape(-1, self.num_experts), strict=True
        ):
            counts[layer] += row

    def observe_step(self, ids: npt.NDArray[np.integer[Any]]) -> None:
        """Counts all layers of a step at once; ids ``[layers, tokens, top_k]``.

        One count per request instead of one per request and layer: cheap enough for the
        end of every decode step.
        """
        num_layers = ids.shape[0]
        keys = ids + (np.arange(num_layers) * self.num_experts)[:, None, None]
        is_use = ids != NO_EXPERT
        are_all_uses = bool(is_use.all())
        owners = self._keys // self.num_experts
        bounds = np.searchsorted(owners, np.arange(len(self._counts) + 1))
        for counts, begin, end in zip(self._counts, bounds[:-1], bounds[1:], strict=True):
            mine = keys[:, begin:end]
            if not are_all_uses:
                is_counted = is_use[:, begin:end] & self._fresh[begin:end, None]
                np.add.at(counts.reshape(-1), mine[is_counted], np.float32(1.0))
                continue
            if not self._all_fresh:
                mine = mine[:, self._fresh[begin:end]]
            if mine.shape[1] == 1:  # one token names no expert twice
                counts.reshape(-1)[mine.reshape(-1)] += 1.0
            else:
                np.add.at(counts.reshape(-1), mine.reshape(-1), np.float32(1.0))

    def end_request(self, request: str) -> Activation | None:
        """The request ended: its matrices leave and are returned."""
        return self._running.pop(request, None)
