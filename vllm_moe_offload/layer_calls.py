"""What a layer call does before anything is read: observe, plan, look ahead.

Most calls find all they need, so this is the hot path: policy, planner and lookahead are asked
in one native call (``csrc/serving.h``) wherever they are native. It takes one argument, a struct
that lives as long as this module's object, and addresses of tensors, of which nothing native
knows more than that: they are looked at here.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_moe_offload.cache.planner import PLAN_TRANSIENT, ExpertCache
from vllm_moe_offload.forecast.lookahead import FLOAT_TYPES
from vllm_moe_offload.forecast.predictor import LIKELY
from vllm_moe_offload.native import LayerCall, ReservedSlot, check, core, last_error
from vllm_moe_offload.policy.base import Policy
from vllm_moe_offload.step import StepTokens
from vllm_moe_offload.transfer.prefetch import Prefetcher, Read

_ID_BYTES = {torch.int32: 4, torch.int64: 8}


class LayerCalls:
    """Layer calls of the steps of one runtime: the model's steps, or a drafter's passes.

    Attributes:
        policy: whom the calls are shown to.
        tokens: of the step that runs; None: no request stands behind what is called.
        num_tokens: tokens of the step that runs.
        policy_ns: time that tracing, scoring and predicting took while nothing was waited for.
        prefetch_ns: the same of beginning and ending reads ahead.
    """

    def __init__(
        self, cache: ExpertCache, policy: Policy, prefetcher: Prefetcher | None
    ) -> None:
        self.tokens: StepTokens | None = None
        self.num_tokens = 0
        self.policy_ns = 0
        self.prefetch_ns = 0
        self._outcome = cache.outcome
        self.policy = policy
        self._prefetcher = prefetcher
        self._votes = np.zeros(cache.shape.num_experts, np.float32)
        self._call = LayerCall(threshold=LIKELY)
        self._serve_call = cache.server_of(self._call)
        self._make_room(8)
        self._observer: int | None = None  # None: the step's first call asks for it
        self._ready_ns = 0  # when the last layer's slots were; 0: no layer was called yet

    def _make_room(self, num_reads: int) -> None:
        self._reads: npt.NDArray[np.void] = np.zeros(num_reads, ReservedSlot)
        self._call.reads = self._reads.ctypes.data

    def begin_step(self, tokens: StepTokens) -> None:
        """A forward pass for real requests begins.

        Raises:
            ValueError: its weights are not what :class:`StepTokens` says.
        """
        began = time.perf_counter_ns()
        weights = tokens.weights
        if weights.dtype != np.float32 or weights.ndim != 1 or not weights.flags.c_contiguous:
            raise ValueError(
                "weights of a step must be contiguous float32 [tokens], got "
                f"{weights.dtype} {list(weights.shape)}, strides {list(weights.strides)}"
            )
        self.tokens = tokens  # keeps the weights
        self.num_tokens = weights.size
        self._call.weights = weights.ctypes.data
        self._ready_ns = 0
        self._observer = None
        self.policy.begin_step(tokens)
        if self._prefetcher is not None:
            self._prefetcher.begin_step(tokens)
        self.policy_ns += time.perf_counter_ns() - began

    def end_step(self) -> None:
        """All its layers ran."""
        began = time.perf_counter_ns()
        self.tokens = None
        self.policy.end_step()
        if self._prefetcher is not None:
            self._prefetcher.end_step()
        self.policy_ns += time.perf_counter_ns() - began

    def extent(self, topk_ids: torch.Tensor | npt.NDArray[Any]) -> tuple[int, int]:
        """Rows of ``topk_ids`` that are tokens, and the flags to plan them with."""
        if self.tokens is None:
            return len(topk_ids), PLAN_TRANSIENT
        return self.num_tokens, 0

    def plan(
        self,
        layer: int,
        topk_ids: torch.Tensor,
        slot_ids: torch.Tensor,
        hidden: torch.Tensor | None,
    ) -> bool:
        """Observes and plans; where nothing is missing, names what is to be read ahead.

        Args:
            layer: index among the MoE layers.
            topk_ids: contiguous int32 or int64 ``[tokens or more, top_k]`` in RAM; rows beyond
                the tokens and ids of -1 are padding, which needs nothing and counts nowhere.
            slot_ids: like ``topk_ids``, receives their slots; an id of -1 gets one that its token
                needs anyway, or another one does, or 0 if none is needed.
            hidden: what the router was given; for prediction only.

        Returns:
            Whether the need fits at once; if not, it was observed all the same.

        Raises:
            ValueError: a tensor is not what is said above.
            NativeError: an id is no expert, or the step has another number of ids.
        """
        if self.tokens is None:
            return self.plan_again(layer, topk_ids, slot_ids)
        prefetcher = self._prefetcher
        if prefetcher is not None:
            self._collect(prefetcher)
        began = time.perf_counter_ns()
        call = self._point_at(layer, topk_ids, slot_ids)
        if self._observer is None:
            self._observer = self.policy.native_observer(self.num_tokens, call.top_k)
        call.observer = self._observer
        if not self._observer:
            self._count_votes(call)
            self.policy.observe(layer, self._routing(topk_ids), self._votes)
        if prefetcher is None:
            call.lookahead = call.hidden = None
        else:
            self._point_ahead(call, prefetcher, topk_ids, hidden)
        self.policy_ns += time.perf_counter_ns() - began
        planned = self._serve_call()
        if planned < 0:
            raise last_error()
        self.policy_ns += self._outcome.policy_ns
        return planned == 1

    def plan_again(self, layer: int, topk_ids: torch.Tensor, slot_ids: torch.Tensor) -> bool:
        """Plans what was observed already, or stands for no request."""
        call = self._point_at(layer, topk_ids, slot_ids)
        call.observer = call.lookahead = call.hidden = None
        return bool(check(self._serve_call()))

    def _point_at(
        self, layer: int, topk_ids: torch.Tensor, slot_ids: torch.Tensor
    ) -> LayerCall:
        """The call's struct, told of these tensors."""
        num_tokens, flags = self.extent(topk_ids)
        dtype, shape = topk_ids.dtype, topk_ids.shape
        id_bytes = _ID_BYTES.get(dtype)
        if (
            id_bytes is None
            or len(shape) != 2
            or not topk_ids.is_contiguous()
            or not topk_ids.is_cpu
        ):
            raise ValueError(
                "topk_ids must be a contiguous CPU tensor [tokens, top_k] of int32 or int64, got "
                f"{_form(topk_ids)}"
            )
        if (
            slot_ids.dtype != dtype
            or slot_ids.shape != shape
            or not slot_ids.is_contiguous()
            or not slot_ids.is_cpu
        ):
            raise ValueError(
                f"slot_ids must be like topk_ids, {_form(topk_ids)}, got {_form(slot_ids)}"
            )
        num_padded, top_k = shape
        if num_tokens > num_padded:
            raise ValueError(
                f"topk_ids has {num_padded} rows, fewer than the step's {num_tokens} tokens"
            )
        call = self._call
        call.layer = layer
        call.ids = topk_ids.data_ptr()
        call.slots = slot_ids.data_ptr()
        call.num_tokens = num_tokens
        call.num_padded_tokens = num_padded
        call.id_bytes = id_bytes
        call.top_k = top_k
        call.flags = flags
        return call

    def _point_ahead(
        self,
        call: LayerCall,
        prefetcher: Prefetcher,
        topk_ids: torch.Tensor,
        hidden: torch.Tensor | None,
    ) -> None:
        """Tells the call's struct what to look ahead with, or asks a predictor that is not native."""
        call.lookahead = prefetcher.predictor.native_handle
        if not call.lookahead:
            prefetcher.observe(call.layer, self._routing(topk_ids))
        most = prefetcher.room
        if hidden is None or not most:
            call.hidden = None
            return
        if most > len(self._reads):
            self._make_room(most)
        hidden_type = FLOAT_TYPES.get(hidden.dtype)
        if (
            hidden_type is None
            or hidden.dim() != 2
            or hidden.shape[0] < self.num_tokens
            or hidden.stride(1) != 1
            or not hidden.is_cpu
        ):
            raise ValueError(
                f"hidden must be a CPU tensor [{self.num_tokens} tokens or more, hidden] of "
                f"float32, bfloat16 or float16 whose rows are contiguous, got {_form(hidden)}"
            )
        call.hidden = hidden.data_ptr()
        call.hidden_type = hidden_type
        call.hidden_stride = hidden.stride(0)
        call.max_reads = most
        call.value = self.policy.full_score

    def _count_votes(self, call: LayerCall) -> None:
        check(
            core.vmo_expert_histogram(
                call.ids,
                call.num_tokens,
                call.top_k,
                call.id_bytes,
                call.weights,
                self._votes.size,
                self._votes.ctypes.data,
            )
        )

    def _routing(self, topk_ids: torch.Tensor) -> npt.NDArray[Any]:
        """Of the step's tokens, without padding."""
        return topk_ids.numpy()[: self.num_tokens]

    def _collect(self, prefetcher: Prefetcher) -> None:
        """Takes in what was read ahead, and how long the layer before computed."""
        began = time.perf_counter_ns()
        if self._ready_ns:
            prefetcher.measured(compute_ns=max(began - self._ready_ns, 0))
        prefetcher.collect()
        self.prefetch_ns += time.perf_counter_ns() - began

    def read_ahead(self, layer: int, hidden: torch.Tensor | None) -> None:
        """Begins what :meth:`plan`, which found nothing missing, said is to be read ahead."""
        prefetcher = self._prefetcher
        if prefetcher is None or self.tokens is None:
            return
        began = time.perf_counter_ns()
        if prefetcher.predictor.native_handle:
            ahead = self._foreseen()
        else:
            ahead = prefetcher.foresee(layer, hidden)
        foreseen = time.perf_counter_ns()
        prefetcher.pass_layer(layer)
        prefetcher.begin(ahead)
        self.policy_ns += foreseen - began
        self.prefetch_ns += time.perf_counter_ns() - foreseen

    def _foreseen(self) -> list[Read]:
        count = self._outcome.num_reads
        if not count:
            return []
        reads: list[Read] = self._reads[:count].tolist()
        return reads

    def slots_are_ready(self, *, in_ns: int) -> None:
        """The kernel begins in so many nanoseconds: from then on computing hides reads."""
        if self._prefetcher is not None and self.tokens is not None:
            self._ready_ns = time.perf_counter_ns() + in_ns


def _form(tensor: torch.Tensor) -> str:
    """What an error says of a tensor."""
    return (
        f"{tensor.dtype} {list(tensor.shape)}, strides {list(tensor.stride())}, "
        f"on {tensor.device}"
    )
