"""What the plugin refuses on a GPU, by name, and what it sets so that the rest works."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from collections.abc import Iterator
from typing import Any

from vllm import envs
from vllm.config import CUDAGraphMode

from vllm_moe_offload.config import OffloadConfig, parse_cache_size
from vllm_moe_offload.integration import captures, formats

logger = logging.getLogger("vllm.moe_offload")

MIN_CAPABILITY = (8, 0)
DTYPES = ("torch.bfloat16", "torch.float16")
MOE_OPS = ("vllm::moe_forward", "vllm::moe_forward_shared")
"""vLLM's operators, inside which experts are computed."""


def problems(config: Any, capability: tuple[int, int] | None) -> Iterator[str]:
    """What about a resolved VllmConfig cannot work on a CUDA device.

    Args:
        config: vLLM's.
        capability: compute capability of the device, None where vLLM cannot say.
    """
    if capability is None or tuple(capability) < MIN_CAPABILITY:
        found = "unknown" if capability is None else ".".join(map(str, capability))
        yield (
            f"compute capability {found}: the cache's kernels were never compiled for it; allowed: "
            f"{'.'.join(map(str, MIN_CAPABILITY))} and later"
        )
        return
    dtype = str(config.model_config.dtype)
    if dtype not in DTYPES:
        yield (
            f"dtype={dtype}: experts of this type were never run on a GPU with offload; allowed "
            f"there: {', '.join(DTYPES)}"
        )
    backend = config.kernel_config.moe_backend
    quantization = config.model_config.quantization
    backends = formats.moe_backends(quantization, (capability[0], capability[1]))
    if backends and backend not in ("auto", *backends):
        yield (
            f"moe_backend={backend!r}: of vLLM's kernels for quantization={quantization!r} these "
            f"can compute on cache slots: {', '.join(backends)}; allowed: "
            f"{', '.join(('auto', *backends))}"
        )
    yield from _graph_problems(config.compilation_config)
    if not envs.VLLM_MOE_SKIP_PADDING:
        yield (
            "VLLM_MOE_SKIP_PADDING=0: vLLM would not say which tokens are padding, and experts "
            "would be fetched for them; allowed: 1 (vLLM's default)"
        )


def _graph_problems(compilation: Any) -> Iterator[str]:
    """What about CUDA graphs cannot work; every ``cudagraph_mode`` of vLLM's does.

    A graph that begins behind an operator reads its results where they lay at capture, and the
    MoE operators return new tensors.
    """
    if compilation.cudagraph_mode in (None, CUDAGraphMode.NONE):
        return
    if compilation.use_inductor_graph_partition:
        yield (
            "use_inductor_graph_partition=True: Inductor's cuts of graphs were never run with "
            "offload; allowed: False (vLLM's default)"
        )
    split = [op for op in compilation.splitting_ops or () if op in MOE_OPS]
    if split:
        yield (
            f"splitting_ops names {', '.join(split)}: a graph that begins behind experts would "
            "read stale results; leave the option out"
        )


def triton_problems() -> Iterator[str]:
    """What the kernels, vLLM's and the cache's, need on the machine to be compiled."""
    if importlib.util.find_spec("triton") is None:
        yield "Triton is not installed, which compiles the expert kernels: pip install triton"
        return
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        yield (
            f"no C compiler ({' or '.join(compilers)}) is on the path, which Triton calls for each "
            "kernel: install gcc, or name one in CC"
        )


def prepare(config: Any, options: OffloadConfig, capability: formats.Capability) -> None:
    """Sets a VllmConfig without :func:`problems` up for offload on a GPU.

    The kernel: ``auto`` is FlashInfer's on most devices, which routes by itself or takes
    weights in an order of its own.

    Graphs: pipeline stages send each other rows padded to the sizes of graphs, so all capture or
    none does, and some may have no experts. Only with a slot for every expert the host of none plans.
    """
    is_shared = config.parallel_config.pipeline_parallel_size > 1
    if is_shared and parse_cache_size(options.cache_gb) != ("share", 1.0):
        captures.capture_nothing(config.compilation_config, "workers divide the layers")
    if config.kernel_config.moe_backend == "auto":
        chosen = formats.moe_backends(config.model_config.quantization, capability)[0]
        config.kernel_config.moe_backend = chosen
        logger.info("MoE offload: moe_backend auto -> %s", chosen)
    if config.model_config.quantization is not None:
        logger.warning(
            "MoE offload: quantization=%s: quantised experts were never run on a GPU before this "
            "release; compare a few answers with those of --moe-offload=off",
            config.model_config.quantization,
        )
