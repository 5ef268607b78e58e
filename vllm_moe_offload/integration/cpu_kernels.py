"""vLLM's kernels for quantised weights on CPUs without AMX.

vLLM asks for AMX before it chooses any of them. What it compiled runs on AVX-512 as well: products
that AMX would compute are then computed by vector instructions. ``cpu_kernels=avx512`` answers
vLLM's question with yes; everything else that its checks ask is still asked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm.platforms import CpuArchEnum, current_platform

from vllm_moe_offload.integration.patching import require, wrap

OPERATORS = ("fused_experts_cpu", "convert_weight_packed")
"""Of vLLM's extension: its builds for older CPUs lack them."""
INSTRUCTIONS: dict[str, Callable[[], bool]] = {
    "AVX-512": torch.cpu._is_avx512_supported,
    "AVX-512 BF16": torch.cpu._is_avx512_bf16_supported,
    "AVX-512 VNNI": torch.cpu._is_vnni_supported,
}
"""What the kernels are compiled for, and who knows whether this CPU has it."""


def has_amx() -> bool:
    """Whether vLLM chooses its kernels for quantised weights by itself."""
    return bool(torch.cpu._is_amx_tile_supported())


def missing() -> list[str]:
    """What the kernels need beside AMX and this machine lacks, by name."""
    if current_platform.get_cpu_architecture() != CpuArchEnum.X86:
        return ["an x86-64 CPU"]
    lacking = [name for name, is_there in INSTRUCTIONS.items() if not is_there()]
    if not lacking:
        import vllm._custom_ops  # noqa: F401 (loads the extension)

        lacking = [name for name in OPERATORS if not hasattr(torch.ops._C, name)]
    return lacking


def problems(quantization: str, choice: str) -> Iterator[str]:
    """Why quantised weights cannot be served on this CPU with this ``cpu_kernels``."""
    if has_amx():
        return
    lacking = missing()
    if lacking:
        yield (
            f"quantization={quantization!r}: vLLM's kernels for it need {', '.join(lacking)}, "
            "which is missing here"
        )
    elif choice == "vllm":
        yield (
            f"quantization={quantization!r}: vLLM's kernels for it ask for AMX, which this CPU "
            "does not have; cpu_kernels=avx512 runs them without (vLLM does not test that)"
        )


# --------------------------------------------------------------------------------------
# CPUExpertsMxfp4._supports_current_device (model_executor/layers/fused_moe/experts/cpu_moe.py)
#   why: it asks for AMX, as CPUExpertsInt8, CPUExpertsInt4 and CPUExpertsFp8 do, though the
#     operators behind them run on AVX-512.
#   upstream: csrc/cpu/sgl-kernels (both ways are compiled; the CPU is asked when they run).
#   remove when: vLLM chooses them on AVX-512.
# CPUFp8BlockScaledMMKernel.is_supported (model_executor/kernels/linear/scaled_mm/cpu.py)
#   why: the same question, asked for the dense layers of fp8 checkpoints; also by
#     CPUFp8PerTensorScaledMMLinearKernel.
#   upstream: csrc/cpu/sgl-kernels.
#   remove when: vLLM chooses them on AVX-512.
def install() -> None:
    """Has vLLM choose these kernels as if the CPU had AMX; for ``cpu_kernels=avx512``."""
    from vllm.model_executor.kernels.linear.scaled_mm import cpu as dense
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    for name in ("CPUExpertsInt8", "CPUExpertsInt4", "CPUExpertsFp8", "CPUExpertsMxfp4"):
        experts = require(cpu_moe, name)
        wrap(experts, "_supports_current_device", _with_amx, kind=staticmethod)
    for name in ("CPUFp8BlockScaledMMKernel", "CPUFp8PerTensorScaledMMLinearKernel"):
        wrap(require(dense, name), "is_supported", _with_amx_for_class, kind=classmethod)


def _with_amx(original: Any) -> Any:
    with _amx_claimed():
        return original()


def _with_amx_for_class(original: Any, cls: Any, *args: Any, **kwargs: Any) -> Any:
    del cls
    with _amx_claimed():
        return original(*args, **kwargs)


# --------------------------------------------------------------------------------------
# torch.cpu._is_amx_tile_supported (torch/cpu/__init__.py)
#   why: the checks above ask it among other questions; only while they run.
#   upstream: vLLM's checks take no answer from outside.
#   remove when: vLLM chooses these kernels on AVX-512.
@contextlib.contextmanager
def _amx_claimed() -> Iterator[None]:
    asked = torch.cpu._is_amx_tile_supported
    torch.cpu._is_amx_tile_supported = _yes
    try:
        yield
    finally:
        torch.cpu._is_amx_tile_supported = asked


def _yes() -> bool:
    return True
