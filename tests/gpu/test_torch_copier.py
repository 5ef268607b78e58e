"""TorchCopier on a real device: bytes, order against kernels, page-locked memory."""

from __future__ import annotations

import contextlib
import functools
import mmap
import random

import numpy as np
import pytest
import torch

from tests.stores import MIXED, build, flip, layer_tensors, layout_of
from vllm_moe_offload.cache.pool import SlotPool
from vllm_moe_offload.store.direct_io import aligned_buffer
from vllm_moe_offload.transfer import TransferError
from vllm_moe_offload.transfer.copier import DEMAND_LANE, PREFETCH_LANE
from vllm_moe_offload.transfer.cuda import cuda_transfer, filled_host_tier
from vllm_moe_offload.transfer.page_lock import PageLocked, PageLockError
from vllm_moe_offload.transfer.torch_copier import TorchCopier

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda", 0)

expected_layer = functools.lru_cache(maxsize=8)(layer_tensors)


def random_arena(layout, num_slots):
    arena = aligned_buffer(num_slots * layout.record_bytes).reshape(num_slots, -1)
    arena[:] = np.random.default_rng(0).integers(0, 256, arena.shape, dtype=np.uint8)
    return arena


@contextlib.contextmanager
def copier_of(layout, num_host_slots, num_slots):
    arena = random_arena(layout, num_host_slots)
    pool = SlotPool(layout, num_slots, device=DEVICE)
    torch.cuda.synchronize()  # its zeros are there
    copier = TorchCopier(pool, PageLocked(arena))
    try:
        yield copier, pool, arena
    finally:
        copier.close()


def assert_copied(pool, arena, host_slot, slot):
    begin = 0
    for spec in (*pool.layout.direct, *pool.layout.tail):
        wanted = torch.from_numpy(arena[host_slot, begin : begin + spec.nbytes].copy())
        have = pool.tensors[spec.name][slot].reshape(-1).view(torch.uint8).cpu()
        assert torch.equal(have, wanted), (spec.name, host_slot, slot)
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


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.expert_bytes}")
def test_every_byte_arrives_and_no_other_changes(layout):
    with copier_of(layout, 5, 7) as (copier, pool, arena):
        pairs = [(4, 0), (0, 3), (2, 6), (2, 1)]
        ticket = copier.copy(DEMAND_LANE, pairs)
        copier.wait_on_host(ticket)
        assert copier.done(ticket)
        copier.release(ticket)
        for host_slot, slot in pairs:
            assert_copied(pool, arena, host_slot, slot)
        for slot in (2, 4, 5):
            for tensor in pool.tensors.values():
                assert not bool(tensor[slot].any())


def test_many_slots_in_one_call():
    with copier_of(layout_of(48, 100), 600, 600) as (copier, pool, arena):
        ticket = copier.copy(PREFETCH_LANE, [(slot, 599 - slot) for slot in range(600)])
        copier.wait_on_host(ticket)
        for slot in range(600):
            assert_copied(pool, arena, slot, 599 - slot)


BUSY_CYCLES = 200_000_000
"""About a tenth of a second on the devices of today."""


@pytest.mark.parametrize("lane", [DEMAND_LANE, PREFETCH_LANE])
@pytest.mark.parametrize("own_stream", [False, True])
def test_copies_wait_for_kernels_that_were_launched_before(lane, own_stream):
    """A kernel that still reads a slot keeps what the slot held (write after read)."""
    layout = layout_of(1 << 20)
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    with (
        copier_of(layout, 2, 1) as (copier, pool, arena),
        torch.cuda.stream(stream),
    ):
        first = copier.copy(lane, [(0, 0)])
        copier.join(first)
        copier.release(first)
        # What is run for the first time may wait for the device: not while it sleeps.
        warm = [pool.tensors["t0"][0].clone() for _ in range(2)]
        torch.cuda._sleep(1)
        stream.synchronize()
        del warm
        torch.cuda._sleep(BUSY_CYCLES)
        kept = pool.tensors["t0"][0].clone()  # queued behind the sleep
        copier.after_compute()
        second = copier.copy(lane, [(1, 0)])
        assert not copier.done(second)  # the kernel before it sleeps, and the host did not wait
        copier.join(second)
        seen = pool.tensors["t0"][0].clone()
        copier.release(second)
        stream.synchronize()
        assert torch.equal(kept.cpu(), torch.from_numpy(arena[0]))
        assert torch.equal(seen.cpu(), torch.from_numpy(arena[1]))


def test_kernels_wait_for_copies_that_were_joined():
    """Read after write: the host never waits, the kernel does."""
    layout = layout_of(64 << 20)
    with copier_of(layout, 2, 2) as (copier, pool, arena):
        for host_slot in (0, 1, 0, 1):
            copier.after_compute()
            ticket = copier.copy(DEMAND_LANE, [(host_slot, 0), (1 - host_slot, 1)])
            copier.join(ticket)
            copier.release(ticket)
            seen = pool.tensors["t0"].clone()
            wanted = torch.from_numpy(arena[[host_slot, 1 - host_slot]])
            assert torch.equal(seen.cpu(), wanted)


def test_copies_into_a_pool_from_within_inference_mode():
    """Layer calls run in it, and the pool was made outside of it."""
    with copier_of(MIXED, 2, 2) as (copier, pool, arena), torch.inference_mode():
        copier.wait_on_host(copier.copy(DEMAND_LANE, [(1, 0)]))
        assert_copied(pool, arena, 1, 0)


def test_memory_is_locked_at_its_exact_size_and_given_back():
    """Also what is no multiple of a huge page; twice, as what is locked cannot be again."""
    layout = layout_of(4096 * 3)
    arena = random_arena(layout, 1001)
    pool = SlotPool(layout, 1, device=DEVICE)
    assert arena.nbytes % mmap.PAGESIZE == 0
    for _ in range(2):
        locked = PageLocked(arena)
        assert torch.from_numpy(arena).is_pinned()
        assert torch.from_numpy(arena[1000]).is_pinned()
        copier = TorchCopier(pool, locked)
        copier.wait_on_host(copier.copy(DEMAND_LANE, [(1000, 0)]))
        assert_copied(pool, arena, 1000, 0)
        copier.close()
        copier.close()
        assert not torch.from_numpy(arena).is_pinned()
        torch.cuda.synchronize()


def test_what_the_driver_refuses_to_lock_is_one_line():
    arena = random_arena(MIXED, 2)
    locked = PageLocked(arena)
    with pytest.raises(PageLockError, match=r"^cannot .*: cudaHostRegister: .+ \(712\); .+$"):
        PageLocked(arena)  # what is locked cannot be again
    with contextlib.suppress(RuntimeError):
        # The runtime keeps the error until somebody asks, as torch does behind every launch.
        torch.zeros(1, device=DEVICE)
    locked.close()
    assert not torch.from_numpy(arena).is_pinned()


# ---- the whole way -------------------------------------------------------------------------


def assert_slot(store, pool, layer, expert, slot):
    for name, wanted in expected_layer(store.layout, store.num_experts, layer).items():
        have = pool.tensors[name][slot].cpu()
        assert torch.equal(have, torch.from_numpy(wanted[expert])), (name, layer, expert)


@pytest.mark.parametrize("host_slots", [3, 17, 1000])
def test_transfer_from_file_to_device(tmp_path, host_slots):
    store = build(tmp_path, num_layers=4, num_experts=8)
    pool = SlotPool(store.layout, 8, device=DEVICE)
    transfer = cuda_transfer(store, pool, host_slots=host_slots, verify=True)
    try:
        assert transfer.expert_ns > 0
        chance = random.Random(host_slots)
        for _ in range(50):
            chosen = chance.sample([(layer, e) for layer in range(4) for e in range(8)], 8)
            requests = [(*expert, slot) for slot, expert in enumerate(chosen)]
            begun = transfer.prefetch(requests[5:])
            transfer.read(requests[:5])
            for *_, slot in requests[5 : 5 + begun]:
                transfer.await_slot(slot)
            for request in requests[: 5 + begun]:
                assert_slot(store, pool, *request)
            assert transfer.poll() == []
    finally:
        transfer.close()


def test_a_damaged_record_never_reaches_the_device(tmp_path):
    store = build(tmp_path)
    flip(store, 2, 3)
    with pytest.raises(TransferError, match=r"expert 3 of layer 2.*checksum"):
        filled_host_tier(store, 100)
