"""Who may run vLLM's kernels for quantised weights: the CPU is asked before vLLM is told."""

from __future__ import annotations

import pytest
import torch
import vllm.model_executor.kernels.linear.scaled_mm.cpu as dense
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
from vllm.platforms import CpuArchEnum, current_platform

from vllm_moe_offload.integration import cpu_kernels


@pytest.fixture
def cpu(monkeypatch):
    """A CPU that has what it is said to have."""

    def pretend(*, amx: bool, instructions: bool = True, operators: bool = True) -> None:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(
            cpu_kernels,
            "INSTRUCTIONS",
            {name: lambda: instructions for name in cpu_kernels.INSTRUCTIONS},
        )
        names = ("silu_and_mul",) if operators else ("no_such_operator",)
        monkeypatch.setattr(cpu_kernels, "OPERATORS", names)
        monkeypatch.setattr(
            type(current_platform), "get_cpu_architecture", lambda *_: CpuArchEnum.X86
        )

    return pretend


def test_with_amx_nothing_is_in_the_way(cpu):
    cpu(amx=True, instructions=False)
    assert not list(cpu_kernels.problems("fp8", "vllm"))


def test_without_amx_the_option_is_named(cpu):
    cpu(amx=False)
    (problem,) = cpu_kernels.problems("fp8", "vllm")
    assert "quantization='fp8'" in problem
    assert "cpu_kernels=avx512" in problem
    assert not list(cpu_kernels.problems("fp8", "avx512"))


@pytest.mark.parametrize(
    ("lacking", "named"), [("instructions", "AVX-512 BF16"), ("operators", "no_such_operator")]
)
@pytest.mark.parametrize("choice", ["vllm", "avx512"])
def test_an_illegal_instruction_is_refused_whatever_the_option(cpu, lacking, named, choice):
    cpu(amx=False, **{lacking: False})
    (problem,) = cpu_kernels.problems("fp8", choice)
    assert named in problem
    assert "missing here" in problem


def test_vllms_checks_are_answered_only_while_they_ask(cpu, monkeypatch):
    cpu(amx=False)
    experts = ("CPUExpertsInt8", "CPUExpertsInt4", "CPUExpertsFp8", "CPUExpertsMxfp4")
    for owner, names in ((cpu_moe, experts), (dense, ("CPUFp8BlockScaledMMKernel",))):
        for name in names:  # put back after the test
            method = "_supports_current_device" if owner is cpu_moe else "is_supported"
            original = vars(getattr(owner, name))[method]
            monkeypatch.setattr(getattr(owner, name), method, original)
    original = vars(dense.CPUFp8PerTensorScaledMMLinearKernel)["is_supported"]
    monkeypatch.setattr(dense.CPUFp8PerTensorScaledMMLinearKernel, "is_supported", original)
    assert not cpu_moe.CPUExpertsInt4._supports_current_device()
    supported, reason = dense.CPUFp8BlockScaledMMKernel.is_supported()
    assert not supported
    assert "AMX" in reason
    cpu_kernels.install()
    assert all(getattr(cpu_moe, name)._supports_current_device() for name in experts)
    supported, reason = dense.CPUFp8BlockScaledMMKernel.is_supported()
    assert supported == hasattr(torch.ops._C, "fp8_scaled_mm_cpu")
    assert not cpu_kernels.has_amx()
