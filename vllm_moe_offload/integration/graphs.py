"""CUDA graphs around the expert layers: pieces in between are captured, experts run eagerly.

A layer call waits for its routing on the host, which no graph can hold. vLLM's piecewise
graphs are split at the operators in ``splitting_ops``; the MoE operators are added there.

A captured piece reads its inputs where they lay at capture. Attention writes into a tensor of
the piece before it, so its address never changes; the MoE operators return new tensors,
and the next piece would read stale memory. Their results therefore go through
:class:`StableOutputs`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from vllm.config import CompilationMode, CUDAGraphMode

logger = logging.getLogger("vllm.moe_offload")

MOE_OPS = ("vllm::moe_forward", "vllm::moe_forward_shared")
BREAKABLE = "VLLM_USE_BREAKABLE_CUDAGRAPH"


def problems(compilation: Any, requested: Any) -> Iterator[str]:
    """What about a resolved CompilationConfig cannot go with experts outside the graphs.

    Args:
        compilation: vLLM's, with its defaults filled in.
        requested: the ``cudagraph_mode`` that the user gave, or None.
    """
    mode = compilation.cudagraph_mode
    if mode is None or mode == CUDAGraphMode.NONE:
        return
    if os.environ.get(BREAKABLE) == "1":
        yield (
            f"{BREAKABLE}=1 (vLLM sets it for some architectures): such graphs are not split at "
            f"experts; set {BREAKABLE}=0 or use --enforce-eager"
        )
    elif compilation.mode != CompilationMode.VLLM_COMPILE:
        yield (
            f"cudagraph_mode={mode.name} with compilation mode "
            f"{getattr(compilation.mode, 'name', compilation.mode)} captures whole steps, "
            "experts included; use mode VLLM_COMPILE (vLLM's default) or --enforce-eager"
        )
    elif requested is not None and requested != CUDAGraphMode.PIECEWISE:
        yield (
            f"cudagraph_mode={requested.name}: experts are planned on the host, outside CUDA "
            "graphs; allowed: PIECEWISE, NONE"
        )
    if compilation.use_inductor_graph_partition:
        yield "use_inductor_graph_partition=True: graphs are split by vLLM, not by Inductor"
    if not compilation.splitting_ops:
        yield (
            f"splitting_ops={compilation.splitting_ops!r}: nothing splits the graphs; leave the "
            "option out"
        )


def split_at_experts(compilation: Any) -> None:
    """Takes the MoE operators out of a CompilationConfig's graphs.

    For one without :func:`problems`, after vLLM resolved its defaults: ``splitting_ops`` that
    a user gives replace vLLM's own instead of adding to them.
    """
    if compilation.cudagraph_mode in (None, CUDAGraphMode.NONE):
        return
    # A list of its own: vLLM's may be shared between configurations.
    ops = list(compilation.splitting_ops)
    compilation.splitting_ops = ops + [op for op in MOE_OPS if op not in ops]
    if compilation.cudagraph_mode != CUDAGraphMode.PIECEWISE:
        logger.info(
            "MoE offload: cudagraph_mode %s -> PIECEWISE, split at the experts too",
            compilation.cudagraph_mode.name,
        )
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE


class StableOutputs:
    """Keeps the results of one layer's MoE operator at addresses that never change.

    One per layer, not one for all: nothing says that the piece behind a layer is the last to
    read its result.
    """

    def __init__(self, max_tokens: int) -> None:
        """``max_tokens``: of the largest captured batch; larger ones run without graphs."""
        self._max_tokens = max_tokens
        self._buffers: list[torch.Tensor] = []

    @classmethod
    def of(cls, compilation: Any) -> StableOutputs | None:
        """For a resolved CompilationConfig; None if it captures nothing."""
        if compilation.cudagraph_mode in (None, CUDAGraphMode.NONE):
            return None
        return cls(int(compilation.max_cudagraph_capture_size))

    def keep(self, result: Any) -> Any:
        """``result`` (a tensor ``[tokens, ...]`` or a tuple of such) where graphs expect it.

        Buffers are allocated by the first call, which is the profiling run's.
        """
        tensors = result if isinstance(result, tuple) else (result,)
        if not self._buffers:
            # Ordinary tensors: captures may run outside the inference mode of this call.
            with torch.inference_mode(False):
                self._buffers = [
                    torch.empty(
                        (self._max_tokens, *tensor.shape[1:]),
                        dtype=tensor.dtype,
                        device=tensor.device,
                    )
                    for tensor in tensors
                ]
        if tensors[0].shape[0] > self._max_tokens:
            return result
        kept = tuple(
            buffer[: tensor.shape[0]].copy_(tensor)
            for buffer, tensor in zip(self._buffers, tensors, strict=True)
        )
        return kept if isinstance(result, tuple) else kept[0]


def keep_outputs(original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    """``MoERunner._forward_impl``, what the MoE operators run."""
    result = original(runner, *args, **kwargs)
    outputs = getattr(runner.routed_experts, "outputs", None)
    return result if outputs is None else outputs.keep(result)
