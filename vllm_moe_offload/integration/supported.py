"""What the plugin refuses to run with, by name, before anything is loaded.

A server that silently ran without offload, or with wrong weights, would be worse than none.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

from vllm import envs
from vllm.config import CompilationMode

from vllm_moe_offload.config import OffloadConfig, OptionError
from vllm_moe_offload.integration import (
    cpu_kernels,
    formats,
    lora,
    ray_platform,
    speculation,
    supported_gpu,
)

LOAD_FORMATS = ("auto", "hf", "safetensors", "dummy")


def check(vllm_config: Any, options: OffloadConfig) -> None:
    """Raises OptionError naming every option that cannot go with offload."""
    problems = [
        *_model_problems(vllm_config),
        *_parallel_problems(vllm_config.parallel_config),
        *_ray_problems(vllm_config.parallel_config),
        *_loading_problems(vllm_config),
        *_platform_problems(vllm_config, options),
    ]
    if problems:
        raise OptionError(
            f"--moe-offload={options.mode} is not possible here; change what is named, or use "
            f"--moe-offload=off: {'; '.join(problems)}"
        )


def _platform_problems(config: Any, options: OffloadConfig) -> Iterator[str]:
    from vllm.platforms import current_platform

    if current_platform.is_cuda():
        yield from supported_gpu.problems(config, current_platform.get_device_capability())
        yield from supported_gpu.triton_problems()
        return
    if not current_platform.is_cpu():
        yield (
            f"platform {current_platform.device_name!r}: ROCm, XPU and TPU have expert kernels of "
            "their own, which cannot compute on cache slots; allowed: cpu, cuda (NVIDIA)"
        )
    yield from _cpu_stage_problems(config)
    quantization = config.model_config.quantization
    if quantization is not None and not any(formats.problems(quantization)):
        yield from cpu_kernels.problems(quantization, options.cpu_kernels)
    if options.host_gb != "auto":
        yield f"host_gb={options.host_gb!r}: without a GPU experts are cached in RAM; see cache_gb"


def _cpu_stage_problems(config: Any) -> Iterator[str]:
    """The memory for what a stage is sent is made in warm-up (GPUModelRunner._dummy_run), and
    CPUModelRunner warms up what it compiled: without, a request fails an assertion."""
    stages = config.parallel_config.pipeline_parallel_size
    if stages > 1 and config.compilation_config.mode == CompilationMode.NONE:
        yield (
            f"pipeline_parallel_size={stages} with enforce_eager=True: vLLM's CPU worker makes "
            "room for what a stage is sent when it warms up compiled code, and fails at the first "
            "request without; leave enforce_eager out"
        )


def _ray_problems(parallel: Any) -> Iterator[str]:
    if not parallel.use_ray:
        return
    if importlib.util.find_spec("ray") is None:
        yield (
            "distributed_executor_backend='ray': Ray is not installed; "
            "pip install 'vllm-moe-offload[ray]'"
        )
    if not getattr(envs, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND", True):  # 0.33 has no other
        yield (
            "VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0: vLLM's older executor on Ray was never run with "
            "offload; allowed: 1"
        )
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        yield from _ray_on_cpus(current_platform)


def _ray_on_cpus(platform: Any) -> Iterator[str]:
    if envs.VLLM_TARGET_DEVICE == "cpu":
        yield (
            "distributed_executor_backend='ray' with VLLM_TARGET_DEVICE='cpu': vLLM's own platform, "
            "which is then taken, has no workers on Ray; unset the variable, here and before "
            "'ray start' on every node"
        )
    elif not platform.ray_device_key:
        yield (
            f"distributed_executor_backend='ray' on a CPU: set {ray_platform.ENVIRONMENT}=1, here "
            "and before 'ray start' on every node"
        )


def _model_problems(config: Any) -> Iterator[str]:
    model = config.model_config
    if not model.is_moe:
        yield (
            f"model {model.model!r} ({', '.join(model.architectures)}) is dense: it has no "
            "routed experts to offload"
        )
    yield from formats.problems(model.quantization)
    yield from lora.problems(config.lora_config)
    yield from speculation.problems(config)
    if getattr(config.cache_config, "kv_sharing_fast_prefill", False):
        yield (
            "kv_sharing_fast_prefill=True: later layers would compute some of a step's tokens, and "
            "which of them is not known here; allowed: False"
        )
    if getattr(model, "enable_sleep_mode", False):
        yield (
            "enable_sleep_mode=True: sleep of level 2 throws cached experts away, and the cache "
            "would go on serving what lies there"
        )
    elif getattr(model, "enable_cumem_allocator", False):
        yield (
            "enable_cumem_allocator=True: its memory can be put to sleep without sleep mode, by "
            "RPC, and the cache would go on serving what lies there"
        )


def _parallel_problems(parallel: Any) -> Iterator[str]:
    for name in ("data_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel, name)
        if size != 1:
            yield (
                f"{name}={size}: ranks would compute each other's tokens, and whose request one "
                "belongs to is not known here; allowed: 1"
            )
    if parallel.decode_context_parallel_size != 1:
        yield (
            f"decode_context_parallel_size={parallel.decode_context_parallel_size}: it takes "
            "several GPUs, and was never run with offload; allowed: 1"
        )
    for name in ("enable_eplb", "enable_elastic_ep"):
        if getattr(parallel, name):
            yield (
                f"{name}=True: experts would move between ranks while serving, and a rank's store "
                "holds those that it started with; allowed: False"
            )
    if parallel.use_ubatching:
        yield (
            f"enable_dbo={parallel.enable_dbo}, ubatch_size={parallel.ubatch_size}: parts of a "
            "batch would run at the same time, and the cache serves one layer call after the "
            "other; allowed: False, 0"
        )


def _loading_problems(config: Any) -> Iterator[str]:
    load_format = config.load_config.load_format
    name = getattr(load_format, "value", load_format)
    if name not in LOAD_FORMATS:
        yield (
            f"load_format={name!r}: stores are built from safetensors files, by a reader of the "
            f"plugin's; allowed: {', '.join(LOAD_FORMATS)}"
        )
    yield from speculation.loading_problems(config.speculative_config, LOAD_FORMATS)
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
