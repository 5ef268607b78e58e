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

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vllm_moe_offload.cache.planner import ExpertCache
from vllm_moe_offload.forecast.predictor import LIKELY, Predictor
from vllm_moe_offload.native import LayerCall, check, core, last_error
from vllm_moe_offload.step import IdArray, StepTokens

FloatArray = npt.NDArray[np.float32]

MAX_ASKED_TOKENS = 64
"""Tokens of a step that the routers are asked about; of longer ones, a sample that is spread
evenly. So many tokens use most experts anyway, and the sample names them."""

NUM_BINS = 16
"""Bins of margins, a quarter of a standard deviation each, as ``csrc/lookahead.h`` has them:
from -2 to 2 standard deviations; what lies beyond counts as these."""

FIRST_GUESSES = 16.0
"""Guesses of every kind that are taken as made before the first one: those with a margin
above 0 right in 3 of 4 cases, the others never."""

MEMORY = 0.995
"""Share of the older evidence that a step keeps: a few hundred steps count."""

FLOAT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""``LayerCall.hidden_type``."""


def sampled_tokens(num_tokens: int) -> npt.NDArray[np.int64]:
    """Tokens of a step of ``num_tokens`` that the routers are asked about (``csrc/lookahead.h``)."""
    count = min(num_tokens, MAX_ASKED_TOKENS)
    return np.arange(count) * num_tokens // max(count, 1)


@dataclass(frozen=True, slots=True)
class Routers:
    """The routers of all MoE layers, which are linear: logits = hidden @ weight.T + bias.

    Copies of their own, in one block: asking the model's modules one by one would take longer
    than predicting may.

    Attributes:
        weight: float32 or bfloat16 ``[layers, experts, hidden]``.
        bias: float32 ``[layers, experts]`` or None.
        num_own_experts: how many of the experts the cache has, the first ones; None: all. The
            others are other ranks', and only say which of them a token will not use.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    num_own_experts: int | None = None

    @classmethod
    def of(
        cls,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        own_experts: Sequence[int] | None = None,
    ) -> Routers:
        """From tensors of any float type; bfloat16 stays, which is half the bytes to read.

        Args:
            weight: ``[layers, experts, hidden]``.
            bias: ``[layers, experts]`` or None.
            own_experts: those that the cache has, in its order; None: all. They are put first.
        """
        if weight.dtype != torch.bfloat16:
            weight = weight.float()
        if own_experts is not None:
            others = sorted(set(range(weight.shape[1])) - set(own_experts))
            order = torch.tensor([*own_experts, *others], device=weight.device)
            weight = weight[:, order]
            bias = None if bias is None else bias[:, order]
        return cls(
            weight.detach().cpu().contiguous(),
            None if bias is None else bias.detach().cpu().float().contiguous(),
            None if own_experts is None else len(own_experts),
        )


class RouterLookahead(Predictor):
    """Predicts with the model's routers (``csrc/lookahead.h``).

    Attributes:
        trust: float32 ``[depth, 2, bins]``: how often guesses of each kind were right, by
            layers ahead (from 1), resident or absent, and margin.
    """

    def __init__(self, routers: Routers, top_k: int, depth: int) -> None:
        """``top_k``: of the model; ``depth``: layers ahead.

        Raises:
            NativeError: a size is impossible, such as as many experts per token as there are.
        """
        num_layers, num_experts, hidden_size = routers.weight.shape
        shape = (depth, 2, NUM_BINS)
        self._tried: FloatArray = np.full(shape, FIRST_GUESSES, np.float32)
        first = np.where(np.arange(NUM_BINS) >= NUM_BINS // 2, 0.75, 0.0)
        self._right: FloatArray = (self._tried * first).astype(np.float32)
        self.trust: FloatArray = self._right / self._tried
        self._reads: npt.NDArray[np.int32] = np.zeros((8, 3), np.int32)
        self._routers = routers
        self._call = LayerCall(threshold=LIKELY)
        self._is_active = False
        self._watched = -1
        self.native_handle = core.vmo_lookahead_create(
            num_layers,
            num_experts,
            num_experts if routers.num_own_experts is None else routers.num_own_experts,
            hidden_size,
            top_k,
            depth,
            MAX_ASKED_TOKENS,
            MEMORY,
            routers.weight.data_ptr(),
            FLOAT_TYPES[routers.weight.dtype],
            None if routers.bias is None else routers.bias.data_ptr(),
            self._tried.ctypes.data,
            self._right.ctypes.data,
            self.trust.ctypes.data,
        )
        if not self.native_handle:
            raise last_error()
        weakref.finalize(self, core.vmo_lookahead_destroy, self.native_handle).atexit = False

    def begin_step(self, tokens: StepTokens) -> None:
        """A step begins."""
        self._is_active = True
        count = tokens.request_of_token.size
        self._watched = check(core.vmo_lookahead_begin_step(self.native_handle, count))

    def observe(self, layer: int, ids: IdArray) -> None:
        """Layer ``layer`` routed the step's tokens, ids ``[tokens, top_k]``: were guesses right?"""
        if layer != self._watched or not self._is_active:
            return
        if ids.dtype != np.int64 or not ids.flags.c_contiguous:
            ids = np.ascontiguousarray(ids, np.int64)
        check(core.vmo_lookahead_observe(self.native_handle, layer, ids.ctypes.data))

    def foresee(
        self,
        layer: int,
        hidden: torch.Tensor | None,
        cache: ExpertCache,
        value: float,
        max_reads: int,
    ) -> npt.NDArray[np.int32]:
        """See :meth:`Predictor.foresee`."""
        if len(self._reads) < max_reads:
            self._reads = np.zeros((max_reads, 3), np.int32)
        if not self._is_active or hidden is None:
            return self._reads[:0]
        call = self._call
        call.layer = layer
        call.hidden = hidden.data_ptr()
        call.hidden_type = FLOAT_TYPES[hidden.dtype]
        call.hidden_stride = hidden.stride(0)
        call.value = value
        call.max_reads = max_reads
        call.reads = self._reads.ctypes.data
        count = check(core.vmo_lookahead_foresee(self.native_handle, cache.handle, call))
        return self._reads[:count]

    def end_step(self) -> None:
        """All layers of the step ran."""
        self._is_active = False
