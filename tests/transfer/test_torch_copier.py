"""TorchCopier over streams that are late: tickets, slots, order, errors."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from tests.stores import MIXED, aligned, layout_of
from tests.streams_double import LockedDouble, StreamsDouble
from vllm_moe_offload.cache.pool import SlotPool
from vllm_moe_offload.transfer.copier import DEMAND_LANE, PREFETCH_LANE
from vllm_moe_offload.transfer.torch_copier import CopyError, TorchCopier


def random_arena(layout, num_slots):
    arena = aligned(num_slots * layout.record_bytes).reshape(num_slots, -1)
    arena[:] = np.random.default_rng(0).integers(0, 256, arena.shape, dtype=np.uint8)
    return arena


class Copying:
    """A copier, and what is at both of its ends."""

    def __init__(self, layout=MIXED, num_host_slots=5, num_slots=7, seed=0):
        self.arena = random_arena(layout, num_host_slots)
        self.locked = LockedDouble(self.arena)
        self.device = StreamsDouble(seed)
        self.pool, self.slots = self.device.pool(layout, num_slots), self.device.slots
        self.copier = TorchCopier(self.pool, self.locked, cuda=self.device)

    def assert_copied(self, host_slot, slot):
        begin = 0
        layout = self.pool.layout
        for spec in (*layout.direct, *layout.tail):
            wanted = self.arena[host_slot, begin : begin + spec.nbytes]
            assert (self.slots[spec.name][slot] == wanted).all(), (spec.name, host_slot, slot)
            begin += spec.nbytes

    def assert_untouched(self, *slots):
        for slot in slots:
            assert all((array[slot] == 0xEE).all() for array in self.slots.values())


LAYOUTS = [
    MIXED,
    layout_of(1),
    layout_of(3, 5, 16, 4096),
    layout_of(4096 * 9, 32768, 32768 + 16, 32784 + 1),
    layout_of(*range(1, 17)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.expert_bytes}")
def test_every_byte_arrives_and_no_other_changes(layout):
    copying = Copying(layout)
    pairs = [(4, 0), (0, 3), (2, 6), (2, 1)]
    ticket = copying.copier.copy(DEMAND_LANE, pairs)
    copying.assert_untouched(*range(7))  # the host did not wait
    copying.copier.wait_on_host(ticket)
    assert copying.copier.done(ticket)
    for host_slot, slot in pairs:
        copying.assert_copied(host_slot, slot)
    copying.assert_untouched(2, 4, 5)


@pytest.mark.parametrize("lane", [DEMAND_LANE, PREFETCH_LANE])
@pytest.mark.parametrize("seed", range(20))
def test_copies_wait_for_what_was_launched_before_and_kernels_for_copies(lane, seed):
    copying = Copying(seed=seed)
    copier, device = copying.copier, copying.device
    seen = []
    for host_slot in range(5):
        copier.after_compute()
        ticket = copier.copy(lane, [(host_slot, 0)])
        copier.join(ticket)
        copier.release(ticket)  # its event is recorded anew at once
        device.launch(lambda: seen.append({n: s[0].copy() for n, s in copying.slots.items()}))
    device.synchronize()
    for host_slot, slots in enumerate(seen):
        for name in slots:
            copying.slots[name][0] = slots[name]
        copying.assert_copied(host_slot, 0)


def test_done_does_not_wait():
    copying = Copying()
    answers = []
    ticket = copying.copier.copy(PREFETCH_LANE, [(1, 1), (2, 2)])
    while not answers or not answers[-1]:
        answers.append(copying.copier.done(ticket))
    assert answers[0] is False
    copying.assert_copied(2, 2)


def test_tickets_are_used_again_and_wrong_ones_refused():
    copier = Copying(num_host_slots=2, num_slots=2).copier
    first, second = (copier.copy(lane, [(0, lane)]) for lane in (DEMAND_LANE, PREFETCH_LANE))
    assert first != second
    copier.release(first)
    assert copier.copy(DEMAND_LANE, [(1, 0)]) == first
    copier.release(first)
    for call in (copier.done, copier.wait_on_host, copier.join, copier.release):
        for wrong in (first, -1, 99):
            with pytest.raises(ValueError, match=f"ticket {wrong} is not in use"):
                call(wrong)
    for lane, pairs, message in [
        (2, [(0, 0)], "lane 2 is not 0 or 1"),
        (-1, [(0, 0)], "lane -1 is not 0 or 1"),
        (DEMAND_LANE, [], "at least one pair"),
        (DEMAND_LANE, [(2, 0)], r"host slot 2 is outside \[0, 2\)"),
        (DEMAND_LANE, [(-1, 0)], r"host slot -1 is outside \[0, 2\)"),
        (DEMAND_LANE, [(0, 1), (0, -1)], r"device slot -1 is outside \[0, 2\)"),
        (DEMAND_LANE, [(0, 2)], r"device slot 2 is outside \[0, 2\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            copier.copy(lane, pairs)
    assert copier.copy(DEMAND_LANE, [(1, 0)]) == first  # refused calls took no ticket


@pytest.mark.parametrize(
    ("broken", "call", "message"),
    [
        ("query", lambda copier: copier.done(0), "asking whether copies are complete"),
        ("event.synchronize", lambda copier: copier.wait_on_host(0), "waiting for copies"),
        ("wait_event", lambda copier: copier.join(0), "having the compute stream wait"),
        ("record", lambda copier: copier.after_compute(), "having copies wait"),
        ("copy_", lambda copier: copier.copy(DEMAND_LANE, [(0, 0)]), "copying to the device"),
    ],
)
def test_an_error_of_the_device_names_call_and_reason(broken, call, message):
    copying = Copying()
    copying.copier.copy(DEMAND_LANE, [(0, 0)])
    copying.device.fail.add(broken)
    with pytest.raises(CopyError) as caught:
        call(copying.copier)
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith(f"failed: CUDA error: {broken} is out of order")


def test_a_failed_copy_leaves_nothing_under_way():
    copying = Copying()
    copying.device.fail.add("record")
    with pytest.raises(CopyError, match="copying to the device failed"):
        copying.copier.copy(PREFETCH_LANE, [(0, 0), (1, 1)])
    assert not copying.device.step()
    assert copying.copier.copy(PREFETCH_LANE, [(0, 0)]) == 0  # nor was a ticket lost


def test_close_waits_for_copies_and_unlocks_the_arena():
    copying = Copying()
    copying.copier.copy(DEMAND_LANE, [(3, 1)])
    copying.copier.copy(PREFETCH_LANE, [(4, 2)])
    copying.copier.close()
    copying.assert_copied(3, 1)
    copying.assert_copied(4, 2)
    copying.copier.close()
    assert copying.locked.num_closed == 1
    for call in (lambda c: c.copy(DEMAND_LANE, [(0, 0)]), TorchCopier.after_compute):
        with pytest.raises(ValueError, match="the copier is closed"):
            call(copying.copier)


def test_the_arena_is_unlocked_even_if_the_device_is_broken():
    copying = Copying()
    copying.device.fail.add("synchronize")
    with pytest.raises(CopyError, match="waiting for copies failed"):
        copying.copier.close()
    assert copying.locked.num_closed == 1


def test_memory_outlives_the_copies_of_a_copier_that_was_never_closed():
    copying = Copying()
    copying.copier.copy(DEMAND_LANE, [(3, 1)])
    gone = weakref.ref(copying.copier)
    del copying.copier
    gc.collect()
    assert gone() is None
    assert copying.locked.num_closed == 1
    copying.assert_copied(3, 1)


def test_a_pool_elsewhere_and_an_arena_of_other_records_are_refused():
    in_ram = SlotPool(MIXED, 2, device=torch.device("cpu"))
    locked = LockedDouble(random_arena(MIXED, 2))
    with pytest.raises(ValueError, match="the pool is on cpu, not on a CUDA device"):
        TorchCopier(in_ram, locked, cuda=StreamsDouble())
    pool = StreamsDouble().pool(MIXED, 2)
    for arena in (locked.arena[:, 1:], locked.arena[:, ::2], locked.arena.reshape(-1)):
        with pytest.raises(ValueError, match=rf"contiguous \[slots, {MIXED.record_bytes}\]"):
            TorchCopier(pool, LockedDouble(arena), cuda=StreamsDouble())
