"""Which CUDA graphs a worker captures: workers that share layers have to agree, as they capture
together."""

from __future__ import annotations

import logging
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.distributed.parallel_state import get_tp_group

logger = logging.getLogger("vllm.moe_offload")

EVERY_SIZE = 2**31 - 1


def agree(vllm_config: Any, *, why_host: str, most_tokens: int) -> None:
    """Sets what this worker captures to what all that share its layers can.

    Capturing runs the model, whose collectives wait for the others. All of them call this once, and
    nobody takes host memory before: so each has found what is available, of which others take too.

    Args:
        vllm_config: the worker's; changed.
        why_host: why its host plans, so that it captures nothing; empty if it does not.
        most_tokens: of the largest batch that it captures.
    """
    captures, most = _least_of_all(int(not why_host), most_tokens)
    compilation = vllm_config.compilation_config
    if not captures:
        capture_nothing(compilation, why_host or "another worker has to")
    elif most < EVERY_SIZE:
        speculative = vllm_config.speculative_config
        guesses = 0 if speculative is None else speculative.num_speculative_tokens
        _capture_at_most(compilation, most, least_tokens=1 + guesses)


def _least_of_all(*values: int) -> list[int]:
    group = get_tp_group()
    if group.world_size == 1:
        return list(values)
    told = torch.tensor(values, dtype=torch.int64, device="cpu")
    torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return [int(value) for value in told]


def capture_nothing(compilation: Any, why: str) -> None:
    """A layer call that the host plans waits for it, which no graph can hold."""
    mode = compilation.cudagraph_mode
    if mode in (None, CUDAGraphMode.NONE):
        return
    logger.warning(
        "MoE offload: the host plans (%s), so no CUDA graphs: cudagraph_mode %s -> NONE",
        why,
        mode.name,
    )
    compilation.cudagraph_mode = CUDAGraphMode.NONE


def _capture_at_most(compilation: Any, most_tokens: int, *, least_tokens: int) -> None:
    """Larger calls may need more experts than there are slots, and run in waves, without graphs.

    ``least_tokens``: of a request that decodes; V1 rounds sizes up to it.
    """
    if compilation.cudagraph_mode in (None, CUDAGraphMode.NONE):
        return
    sizes = [size for size in compilation.cudagraph_capture_sizes if size <= most_tokens]
    if len(sizes) == len(compilation.cudagraph_capture_sizes):
        return
    has_any = bool(sizes) and sizes[-1] >= least_tokens
    logger.warning(
        "MoE offload: the cache holds fewer experts than a layer has: CUDA graphs for %s of at most "
        "%d tokens; raise cache_gb for more",
        "batches" if has_any else "no batch",
        most_tokens,
    )
    if not has_any:
        compilation.cudagraph_mode = CUDAGraphMode.NONE
        return
    compilation.cudagraph_capture_sizes = sizes
    compilation.max_cudagraph_capture_size = sizes[-1]
