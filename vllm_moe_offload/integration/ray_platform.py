"""Entry point of the group ``vllm.platform_plugins``: a CPU platform with Ray, where it is asked for.

vLLM calls it in every process, with and without offload, before it knows its platform. It imports
nothing of vLLM's but the module that calls it.
"""

from __future__ import annotations

import os

ENVIRONMENT = "VLLM_MOE_OFFLOAD_RAY_CPU"
"""Asks for the platform. Every process needs it before vLLM is imported there, so it has to be set
before ``ray start``, too; vLLM carries variables to Ray's actors only after that."""
ON, OFF = "1", ("", "0")


def is_asked_for() -> bool:
    """Whether this process's environment asks for the platform."""
    return os.environ.get(ENVIRONMENT, "") not in OFF


def ray_cpu_platform() -> str | None:
    """Class of the platform; None where nobody asks for it, or where this vLLM is not for CPUs."""
    if not is_asked_for():
        return None
    from vllm.platforms import cpu_platform_plugin

    if cpu_platform_plugin() is None:
        return None
    return "vllm_moe_offload.integration.ray_cpu_platform.RayCpuPlatform"
