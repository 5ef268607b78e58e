"""How much host memory a GPU server takes for experts, and what it says about it."""

import logging
from types import SimpleNamespace

import pytest

from vllm_moe_offload.cache.host_memory import Headroom, Probe
from vllm_moe_offload.config import GIB, OffloadConfig
from vllm_moe_offload.integration import gpu_memory

LAYERS, EXPERTS = 4, 8
RECORD = GIB // 2
"""16 GiB in all."""


class Machine:
    """What is said to be available, and what touching finds beside it."""

    def __init__(self, monkeypatch, available_gib, grown_gib=0, source="the system"):
        self.available_gib, self.grown_gib, self.source = available_gib, grown_gib, source
        self.probed = []
        monkeypatch.setattr(gpu_memory, "host_headroom", lambda: self.headroom(0))
        monkeypatch.setattr(gpu_memory, "probe", self.probe)

    def headroom(self, grown_gib):
        available = (self.available_gib + grown_gib) * GIB
        return Headroom(available, 40 * GIB, self.source)

    def probe(self, wanted_bytes, look, wait, *, floor_bytes):
        self.probed.append((wanted_bytes, floor_bytes))
        return Probe(0, self.headroom(self.grown_gib))


def rows(host_gb="auto", ranks=1):
    memory = object.__new__(gpu_memory.GpuMemory)
    memory._vllm_config = SimpleNamespace(
        parallel_config=SimpleNamespace(use_ray=False, local_world_size=ranks)
    )
    store = SimpleNamespace(
        num_layers=LAYERS, num_experts=EXPERTS, layout=SimpleNamespace(record_bytes=RECORD)
    )
    shape = SimpleNamespace(holds_everything=False)
    return memory._host_slots(store, shape, OffloadConfig(host_gb=host_gb))


def test_all_experts_where_the_memory_is_said_to_be_there(monkeypatch):
    machine = Machine(monkeypatch, 20)
    assert rows() == LAYERS * EXPERTS
    assert machine.probed == []


def test_memory_that_grew_when_touched_counts(monkeypatch, caplog):
    machine = Machine(monkeypatch, 6, grown_gib=6)
    with caplog.at_level(logging.INFO, "vllm.moe_offload"):
        assert rows() == (6 + 6 - 4) * 2
    assert machine.probed == [(16 * GIB, None)]
    assert "12.00 GiB of 40.00 GiB available" in caplog.text
    assert "were touched" in caplog.text


def test_the_log_names_the_bound_that_decided(monkeypatch, caplog):
    Machine(monkeypatch, 6, source="cgroup /sys/fs/cgroup/jobs")
    with caplog.at_level(logging.INFO, "vllm.moe_offload"):
        assert rows() == 4
    assert "available, says cgroup /sys/fs/cgroup/jobs" in caplog.text


def test_ranks_share_what_is_said_and_do_not_probe(monkeypatch):
    machine = Machine(monkeypatch, 8)
    assert rows(ranks=2) == 4
    assert machine.probed == []


@pytest.mark.parametrize(("host_gb", "probed"), [(5, 0), ("25%", 0), (10, 1), ("100%", 1)])
def test_a_size_that_the_user_gave_is_taken_and_ram_is_made_to_grow(
    monkeypatch, host_gb, probed
):
    machine = Machine(monkeypatch, 6)
    assert rows(host_gb) == {5: 10, "25%": 8, 10: 20, "100%": 32}[host_gb]
    assert [floor for _, floor in machine.probed] == [gpu_memory.EXPLICIT_FLOOR_BYTES] * probed
