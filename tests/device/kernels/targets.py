"""Kernels compiled for GPUs that are not here."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

CAPABILITIES = (80, 89, 90, 120)


class AbsentGPU:
    """What Triton asks a driver before it launches; nothing is launched on it."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.utils = SimpleNamespace()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Compiled:
    """What calls of kernels, which are only compiled, have made of them.

    A context manager; inside of it ``kernel[grid](...)`` compiles and launches nothing.
    """

    def __init__(self, capability: int, kernels: Any) -> None:
        self.kernels: list[Any] = [
            kernels.count,
            kernels.plan,
            kernels.gather,
            kernels.rename,
        ]
        self.capability = capability

    def __enter__(self) -> Compiled:
        driver.set_active(AbsentGPU(self.capability))
        for kernel in self.kernels:
            kernel.device_caches.clear()
            kernel.run = _without_launch(kernel.run)
        return self

    def __exit__(self, *_: object) -> None:
        for kernel in self.kernels:
            del kernel.run

    def variants(self) -> list[tuple[str, Any]]:
        """Name and compiled kernel of each."""
        return [
            (kernel.__name__, compiled)
            for kernel in self.kernels
            for compiled in kernel.device_caches[0][0].values()
        ]


def _without_launch(run: Any) -> Any:
    def compile_only(*arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        del warmup
        return run(*arguments, grid=grid, warmup=True, **options)

    return compile_only


def resources(compiled: Any, directory: Path) -> tuple[int, int]:
    """Registers of a thread, and bytes of them that spill, by the assembler that Triton used."""
    path = directory / "kernel.ptx"
    path.write_text(compiled.asm["ptx"])
    target = re.search(r"\.target (\w+)", compiled.asm["ptx"])
    assert target is not None
    is_blackwell = compiled.metadata.target.arch >= 100
    tool = "ptxas-blackwell" if is_blackwell else "ptxas"
    printed = subprocess.run(
        [
            Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool,
            *("--verbose", "--gpu-name", target.group(1), path, "--output-file", "/dev/null"),
            *(() if compiled.metadata.enable_fp_fusion else ("--fmad=false",)),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    registers = re.search(r"Used (\d+) registers", printed)
    spilled = re.search(r"(\d+) bytes spill stores", printed)
    assert registers is not None
    assert spilled is not None, printed
    return int(registers.group(1)), int(spilled.group(1))
