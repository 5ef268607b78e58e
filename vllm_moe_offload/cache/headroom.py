"""How much host memory may still be taken, by all that know of it."""

from __future__ import annotations

import psutil

from vllm_moe_offload.cache.host_memory import Headroom, cgroup_headrooms


def host_headroom() -> Headroom:
    """What the system, and the cgroups that this process is in, leave at most now."""
    memory = psutil.virtual_memory()
    system = Headroom(memory.available, memory.total, "the system")
    return min((system, *cgroup_headrooms()), key=lambda headroom: headroom.spare_bytes)
