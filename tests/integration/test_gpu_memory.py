"""How much host memory a GPU server takes for experts, and what it says about it."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.config import CompilationConfig, CUDAGraphMode

from vllm_moe_offload.cache.host_memory import Headroom, Probe
from vllm_moe_offload.cache.planner import CacheShape
from vllm_moe_offload.config import GIB, OffloadConfig
from vllm_moe_offload.integration import captures, gpu_memory
from vllm_moe_offload.plan.ways import Way
from vllm_moe_offload.transfer.page_lock import PageLockError

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
    return memory._host_slots(store, OffloadConfig(host_gb=host_gb))


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


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No other worker shares the layers."""
    monkeypatch.setattr(captures, "get_tp_group", lambda: SimpleNamespace(world_size=1))


class OneGpu(gpu_memory.GpuMemory):
    """As GpuMemory, on no device, with room in host memory for so many experts."""

    def __init__(self, num_host_slots, quantization=None, pipeline_parallel_size=1):
        self._vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(quantization=quantization),
            parallel_config=SimpleNamespace(pipeline_parallel_size=pipeline_parallel_size),
            compilation_config=CompilationConfig(cudagraph_mode=CUDAGraphMode.FULL),
            speculative_config=None,
        )
        self._num_host_slots = 0
        self.room = num_host_slots

    def _host_slots(self, store, options):
        return self.room

    @property
    def captures(self):
        return self._vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE


@pytest.mark.parametrize(
    ("memory", "num_slots", "share", "draft_layers", "found"),
    [
        (OneGpu(12), 5, None, [], (Way.DEVICE, "")),
        (OneGpu(12), 12, None, [], (Way.RESIDENT, "")),
        (OneGpu(0, "fp8", 2), 12, object(), [object()], (Way.RESIDENT, "")),
        (OneGpu(11), 5, None, [], (Way.HOST, "host memory holds 11 of 12 experts")),
        (OneGpu(12, "fp8"), 5, None, [], (Way.HOST, "experts are quantised (fp8)")),
        (OneGpu(12, None, 2), 5, None, [], (Way.HOST, "workers divide the layers")),
        (OneGpu(12), 5, object(), [], (Way.HOST, "workers divide the experts of a layer")),
        (OneGpu(12), 5, None, [object()], (Way.HOST, "the drafter has experts of its own")),
    ],
)
def test_who_plans(memory, num_slots, share, draft_layers, found):
    store = SimpleNamespace(num_layers=3, num_experts=4)
    layers = [SimpleNamespace(share=share, top_k=2)] * 3
    shape = CacheShape(3, 4, num_slots)
    decided = memory.way(shape, store, layers, draft_layers, OffloadConfig(mode="trace"))
    assert decided == found
    assert memory.captures is (found[0] is not Way.HOST)


def test_the_host_plans_where_layers_differ_in_experts_per_token():
    layers = [SimpleNamespace(share=None, top_k=top_k) for top_k in (2, 2, 4)]
    store = SimpleNamespace(num_layers=3, num_experts=4)
    found = OneGpu(12).way(CacheShape(3, 4, 5), store, layers, [], OffloadConfig(mode="trace"))
    assert found == (Way.HOST, "layers differ in experts per token")


@pytest.mark.parametrize("is_pinned", [True, False])
def test_memory_that_cuda_does_not_know_as_locked_is_refused(is_pinned, monkeypatch):
    """vLLM's function would copy all of it, and the GPU would read the copy."""
    arena = np.zeros((12, 64), np.uint8)
    host = SimpleNamespace(arena=arena, close=lambda: None)
    monkeypatch.setattr(gpu_memory, "filled_host_tier", lambda *_, **__: (host, None))
    monkeypatch.setattr(gpu_memory, "io_cpus", lambda: ())
    monkeypatch.setattr(gpu_memory, "get_accelerator_view_from_cpu_tensor", lambda view: view)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: is_pinned)
    memory = OneGpu(12)
    memory._vllm_config.load_config = SimpleNamespace(use_tqdm_on_load=False)
    if is_pinned:
        records, _ = memory.records(None, OffloadConfig(mode="trace"))
        assert records.data_ptr() == arena.ctypes.data
        return
    with pytest.raises(PageLockError, match="CUDA does not know"):
        memory.records(None, OffloadConfig(mode="trace"))
