"""Host memory that may still be taken."""

from __future__ import annotations

from types import SimpleNamespace

from vllm_moe_offload.cache import headroom
from vllm_moe_offload.cache.host_memory import Headroom
from vllm_moe_offload.config import GIB


def test_the_least_of_system_and_cgroups(monkeypatch) -> None:
    small = Headroom(5 * GIB, 6 * GIB, "cgroup /jobs")
    memory = SimpleNamespace(available=50 * GIB, total=64 * GIB)
    monkeypatch.setattr(headroom.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(headroom, "cgroup_headrooms", lambda: iter([small]))
    assert headroom.host_headroom() is small
    monkeypatch.setattr(headroom, "cgroup_headrooms", lambda: iter([]))
    assert headroom.host_headroom() == Headroom(50 * GIB, 64 * GIB, "the system")
