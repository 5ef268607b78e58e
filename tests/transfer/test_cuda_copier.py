"""The CUDA copier's own code, compiled for the CPU over a stub of the CUDA runtime.

Shows that tickets, slot and offset arithmetic, the gather kernel's loops and the C ABI are right.
What streams and devices do is for ``tests/gpu``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.stores import MIXED, aligned, build, layer_tensors, layout_of
from vllm_moe_offload.transfer import cuda_library
from vllm_moe_offload.transfer.copier import DEMAND_LANE, PREFETCH_LANE
from vllm_moe_offload.transfer.cuda import CudaCopier, cuda_transfer
from vllm_moe_offload.transfer.cuda_library import CudaError

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
STUB = Path(__file__).resolve().parents[1] / "cuda_stub"

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module", autouse=True)
def stubbed_library(tmp_path_factory):
    """Puts the CPU build in the place of ``_cuda.so``."""
    target = tmp_path_factory.mktemp("cuda") / "_cuda.so"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas"]
    flags += os.environ.get("VMO_STUB_FLAGS", "").split()  # of scripts/sanitize.sh
    sources = [*sorted(SOURCES.glob("*.cpp")), "-x", "c++", *sorted(SOURCES.glob("*.cu"))]
    subprocess.run(["g++", *flags, "-I", STUB, "-o", target, *sources], check=True)
    previous = cuda_library._PATH
    cuda_library._PATH = target
    cuda_library.cuda_library.cache_clear()
    yield
    cuda_library._PATH = previous
    cuda_library.cuda_library.cache_clear()


class FakeDevicePool:
    """Slots in RAM that are said to be on a CUDA device, with guards around each tensor."""

    GUARD = 64

    def __init__(self, layout, num_slots, offset=0, device="cuda:0"):
        self.layout = layout
        self.num_slots = num_slots
        self.device = torch.device(device)
        self.buffers, self.slots = {}, {}
        for spec in layout.tensors:
            begin = self.GUARD + offset
            nbytes = num_slots * spec.nbytes
            buffer = aligned(begin + nbytes + self.GUARD)
            buffer.fill(0xEE)
            self.buffers[spec.name] = buffer
            self.slots[spec.name] = buffer[begin : begin + nbytes].reshape(num_slots, -1)

    def addresses(self):
        return {name: slots.ctypes.data for name, slots in self.slots.items()}

    def assert_guards(self):
        for name, buffer in self.buffers.items():
            outside = buffer.size - self.slots[name].size
            begin = self.slots[name].ctypes.data - buffer.ctypes.data
            assert (buffer[:begin] == 0xEE).all(), name
            assert (buffer[buffer.size - (outside - begin) :] == 0xEE).all(), name


def random_arena(layout, num_slots):
    arena = aligned(num_slots * layout.record_bytes).reshape(num_slots, -1)
    arena[:] = np.random.default_rng(0).integers(0, 256, arena.shape, dtype=np.uint8)
    return arena


def assert_copied(pool, arena, host_slot, slot):
    begin = 0
    for spec in (*pool.layout.direct, *pool.layout.tail):
        wanted = arena[host_slot, begin : begin + spec.nbytes]
        assert (pool.slots[spec.name][slot] == wanted).all(), (spec.name, host_slot, slot)
        begin += spec.nbytes


LAYOUTS = [
    MIXED,
    layout_of(1),
    layout_of(3, 5, 16, 4096),
    layout_of(4, 32, 48, 8, 2880),
    layout_of(4096 * 9, 32768, 32768 + 16, 32784 + 1),
    layout_of((1 << 20) + 4096, 11520, 7),
    layout_of(*range(1, 17)),
]


@pytest.mark.parametrize("engine", ["memcpy", "gather"])
@pytest.mark.parametrize("offset", [0, 1, 4, 16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.expert_bytes}")
def test_every_byte_arrives_and_no_other_changes(layout, offset, engine):
    pool, arena = FakeDevicePool(layout, 7, offset), random_arena(layout, 5)
    copier = CudaCopier(pool, arena, compute_stream=lambda: 0, engine=engine)
    pairs = [(4, 0), (0, 3), (2, 6), (2, 1)]
    ticket = copier.copy(DEMAND_LANE, pairs)
    copier.wait_on_host(ticket)
    assert copier.done(ticket)
    for host_slot, slot in pairs:
        assert_copied(pool, arena, host_slot, slot)
    for slot in (2, 4, 5):
        assert all((slots[slot] == 0xEE).all() for slots in pool.slots.values())
    pool.assert_guards()
    copier.close()


def test_more_slots_than_one_launch_takes():
    layout = layout_of(48, 100)
    pool, arena = FakeDevicePool(layout, 600), random_arena(layout, 600)
    copier = CudaCopier(pool, arena, compute_stream=lambda: 0, engine="gather")
    copier.copy(PREFETCH_LANE, [(slot, 599 - slot) for slot in range(600)])
    for slot in range(600):
        assert_copied(pool, arena, slot, 599 - slot)
    copier.close()


def test_tickets_are_used_again_and_wrong_ones_refused():
    pool, arena = FakeDevicePool(MIXED, 2), random_arena(MIXED, 2)
    copier = CudaCopier(pool, arena, compute_stream=lambda: 0)
    copier.after_compute()
    first, second = (copier.copy(lane, [(0, lane)]) for lane in (DEMAND_LANE, PREFETCH_LANE))
    assert first != second
    copier.join(first)
    copier.release(first)
    assert copier.copy(DEMAND_LANE, [(1, 0)]) == first
    copier.release(first)
    for call in (copier.done, copier.wait_on_host, copier.join, copier.release):
        for wrong in (first, -1, 99):
            with pytest.raises(CudaError, match=f"ticket {wrong} is not in use"):
                call(wrong)
    for lane, pairs, message in [
        (2, [(0, 0)], "lane 2 is not 0 or 1"),
        (DEMAND_LANE, [(2, 0)], r"host slot 2 is outside \[0, 2\)"),
        (DEMAND_LANE, [(0, 1), (0, -1)], r"device slot -1 is outside \[0, 2\)"),
    ]:
        with pytest.raises(CudaError, match=message):
            copier.copy(lane, pairs)
    assert copier.copy(DEMAND_LANE, [(1, 0)]) == first  # refused calls took no ticket
    copier.close()


def test_memory_is_locked_once_and_given_back():
    pool, arena = FakeDevicePool(MIXED, 2), random_arena(MIXED, 2)
    for _ in range(2):
        copier = CudaCopier(pool, arena, compute_stream=lambda: 0)
        with pytest.raises(CudaError, match=r"cudaHostRegister failed: cudaError\w+ \(712\)"):
            CudaCopier(pool, arena, compute_stream=lambda: 0)
        copier.close()
        copier.close()
        with pytest.raises(ValueError, match="the copier is closed"):
            copier.done(0)
    CudaCopier(pool, arena, compute_stream=lambda: 0)  # forgotten, not closed
    CudaCopier(pool, arena, compute_stream=lambda: 0).close()


def test_a_device_that_does_not_exist():
    pool = FakeDevicePool(MIXED, 2, device="cuda:3")
    with pytest.raises(CudaError, match=r"cudaSetDevice failed: cudaErrorInvalidDevice"):
        CudaCopier(pool, random_arena(MIXED, 2), compute_stream=lambda: 0)


def test_too_many_tensors_for_the_kernel():
    layout = layout_of(*range(1, 18))
    pool, arena = FakeDevicePool(layout, 2), random_arena(layout, 2)
    with pytest.raises(CudaError, match="at most 16 tensors, got 17"):
        CudaCopier(pool, arena, compute_stream=lambda: 0, engine="gather")
    copier = CudaCopier(pool, arena, compute_stream=lambda: 0)
    copier.copy(DEMAND_LANE, [(1, 0)])
    assert_copied(pool, arena, 1, 0)
    copier.close()


@pytest.mark.parametrize("engine", ["memcpy", "gather"])
@pytest.mark.parametrize("host_slots", [3, 17, 1000])
def test_the_whole_way(tmp_path, engine, host_slots):
    store = build(tmp_path, num_layers=4, num_experts=8)
    pool = FakeDevicePool(store.layout, 8)
    transfer = cuda_transfer(
        store, pool, host_slots=host_slots, compute_stream=lambda: 0, engine=engine, verify=True
    )
    assert transfer.expert_ns > 0
    chance = np.random.default_rng(host_slots)
    for _ in range(20):
        chosen = chance.choice(32, 8, replace=False)
        requests = [(int(c) // 8, int(c) % 8, slot) for slot, c in enumerate(chosen)]
        begun = transfer.prefetch(requests[5:])
        transfer.read(requests[:5])
        for *_, slot in requests[5 : 5 + begun]:
            transfer.await_slot(slot)
        for layer, expert, slot in requests[: 5 + begun]:
            for name, wanted in layer_tensors(store.layout, 8, layer).items():
                assert (pool.slots[name][slot] == wanted[expert]).all()
    assert transfer.poll() == []
    transfer.close()
    pool.assert_guards()
