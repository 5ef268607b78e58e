"""What the plugin refuses on a GPU, by name, and what it sets so that the rest works."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from vllm_moe_offload.integration import formats, graphs
from vllm_moe_offload.transfer.cuda_library import cuda_library

logger = logging.getLogger("vllm.moe_offload")

MIN_CAPABILITY = (8, 0)
DTYPES = ("torch.bfloat16", "torch.float16")


def problems(
    config: Any, requested_graphs: Any, capability: tuple[int, int] | None
) -> Iterator[str]:
    """What about a resolved VllmConfig cannot work on a CUDA device.

    Args:
        config: vLLM's.
        requested_graphs: ``cudagraph_mode`` as the user gave it, None for vLLM's default.
        capability: compute capability of the device, None where vLLM cannot say.
    """
    if capability is None or tuple(capability) < MIN_CAPABILITY:
        found = "unknown" if capability is None else ".".join(map(str, capability))
        yield (
            f"compute capability {found}: the copier is not built for it; allowed: "
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
    yield from graphs.problems(config.compilation_config, requested_graphs)


def library_problems() -> Iterator[str]:
    """Says so if the copier was not built, before a model is loaded for it."""
    try:
        cuda_library()
    except ImportError as error:
        yield str(error)


def prepare(config: Any, capability: formats.Capability) -> None:
    """Sets a VllmConfig without :func:`problems` up for offload on a GPU.

    The kernel: ``auto`` is FlashInfer's on most devices, which routes by itself or takes
    weights in an order of its own.
    """
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
    graphs.split_at_experts(config.compilation_config)
