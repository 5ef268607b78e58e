"""What the plugin refuses to run with, by name, before anything is loaded.

A server that silently ran without offload, or with wrong weights, would be worse than none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_moe_offload.config import OffloadConfig, OptionError

LOAD_FORMATS = ("auto", "hf", "safetensors", "dummy")


def check(vllm_config: Any, options: OffloadConfig) -> None:
    """Raises OptionError naming every option that cannot go with offload."""
    problems = list(_problems(vllm_config))
    if problems:
        raise OptionError(
            f"--moe-offload={options.mode} is not possible here:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
            + "\nChange the option, or use --moe-offload=off."
        )


def _problems(config: Any) -> Iterator[str]:
    yield from _model_problems(config)
    yield from _parallel_problems(config.parallel_config)
    yield from _loading_problems(config)
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        yield (
            f"platform {current_platform.device_name!r}: this release serves on the CPU platform; "
            "GPU support is not finished"
        )


def _model_problems(config: Any) -> Iterator[str]:
    model = config.model_config
    if not model.is_moe:
        yield (
            f"model {model.model!r} ({', '.join(model.architectures)}) is dense: it has no "
            "routed experts to offload"
        )
    if model.quantization is not None:
        yield f"quantization={model.quantization!r}: experts must be bf16, fp16 or fp32"
    if config.lora_config is not None:
        yield "enable_lora=True: LoRA on experts is not supported"
    if config.speculative_config is not None:
        yield f"speculative_config (method {config.speculative_config.method!r}) is not supported"
    if getattr(model, "enable_sleep_mode", False):
        yield "enable_sleep_mode=True is not supported"


def _parallel_problems(parallel: Any) -> Iterator[str]:
    for name, allowed in (
        ("data_parallel_size", 1),
        ("pipeline_parallel_size", 1),
        ("prefill_context_parallel_size", 1),
        ("decode_context_parallel_size", 1),
        ("enable_expert_parallel", False),
        ("enable_eplb", False),
        ("enable_elastic_ep", False),
        ("enable_dbo", False),
        ("use_sequence_parallel_moe", False),
    ):
        value = getattr(parallel, name, allowed)
        if value != allowed:
            yield f"{name}={value!r} is not supported, allowed: {allowed!r}"


def _loading_problems(config: Any) -> Iterator[str]:
    load_format = config.load_config.load_format
    name = getattr(load_format, "value", load_format)
    if name not in LOAD_FORMATS:
        yield f"load_format={name!r} is not supported, allowed: {', '.join(LOAD_FORMATS)}"
    offload = config.offload_config
    uva_gb = getattr(getattr(offload, "uva", None), "cpu_offload_gb", 0)
    if uva_gb:
        yield f"cpu_offload_gb={uva_gb!r}: vLLM's own offloader cannot hold the same weights"
    group_size = getattr(getattr(offload, "prefetch", None), "offload_group_size", 0)
    if group_size:
        yield (
            f"offload_group_size={group_size!r}: vLLM's prefetch offloader cannot hold the "
            "same weights"
        )
    if getattr(config, "weight_transfer_config", None) is not None:
        yield "weight_transfer_config: weights cannot be replaced while the store holds them"
    pass_config = getattr(config.compilation_config, "pass_config", None)
    if getattr(pass_config, "enable_sp", False):
        yield "compilation pass enable_sp=True (sequence parallelism) is not supported"
