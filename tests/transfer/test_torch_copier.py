"""The copier over streams that are as late as the test wants; the real ones are in tests/gpu."""

import contextlib

import numpy as np
import pytest
import torch

from tests.stores import MIXED, layout_of
from vllm_moe_offload.cache.pool import SlotPool
from vllm_moe_offload.transfer.copier import DEMAND_LANE, PREFETCH_LANE
from vllm_moe_offload.transfer.torch_copier import TorchCopier


class Stream:
    """Notes what it is told; a copy on a CPU is made at once."""

    def __init__(self, device=None):
        self.told = []
        self.num_passed = 0

    def wait_event(self, event):
        self.told.append(("waits for", event.stream, event.place))

    def synchronize(self):
        self.num_passed = len(self.told)


class Event:
    def record(self, stream):
        stream.told.append("event")
        self.stream, self.place = stream, len(stream.told)

    def query(self):
        return self.stream.num_passed >= self.place

    def synchronize(self):
        self.stream.num_passed = max(self.stream.num_passed, self.place)


class Locked:
    num_closed = 0

    def close(self):
        self.num_closed += 1


@pytest.fixture
def compute(monkeypatch):
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    return stream


def copier_of(layout, num_host_slots, num_slots):
    arena = np.random.default_rng(0).integers(
        0, 256, (num_host_slots, layout.record_bytes), dtype=np.uint8
    )
    pool = SlotPool(layout, num_slots)
    return TorchCopier(pool, arena, Locked()), pool, arena


@pytest.mark.parametrize(
    "layout",
    [MIXED, layout_of(1), layout_of(3, 5, 16, 4096), layout_of(*range(1, 18))],
    ids=str,
)
def test_every_byte_arrives_and_no_other_changes(layout, compute):
    copier, pool, arena = copier_of(layout, 5, 7)
    pairs = [(4, 0), (0, 3), (2, 6), (2, 1)]
    copier.release(copier.copy(DEMAND_LANE, pairs))
    for host_slot, slot in pairs:
        begin = 0
        for spec in (*layout.direct, *layout.tail):
            wanted = torch.from_numpy(arena[host_slot, begin : begin + spec.nbytes].copy())
            have = pool.tensors[spec.name][slot].reshape(-1).view(torch.uint8)
            assert torch.equal(have, wanted), spec.name
            begin += spec.nbytes
    for slot in (2, 4, 5):
        assert not any(bool(tensor[slot].any()) for tensor in pool.tensors.values())


def test_tickets_stand_for_their_own_copies(compute):
    copier, _, _ = copier_of(MIXED, 2, 2)
    first = copier.copy(DEMAND_LANE, [(0, 0)])
    second = copier.copy(PREFETCH_LANE, [(1, 1)])
    assert not copier.done(first)
    copier.wait_on_host(first)
    assert copier.done(first)
    assert not copier.done(second), "another stream"
    copier.release(first)
    with pytest.raises(KeyError):
        copier.done(first)


def test_kernels_wait_for_copies_and_copies_for_kernels(compute):
    copier, _, _ = copier_of(MIXED, 2, 2)
    ticket = copier.copy(DEMAND_LANE, [(0, 0)])
    copier.join(ticket)
    (joined,) = compute.told
    assert joined == ("waits for", copier._lanes[DEMAND_LANE], 1)
    copier.after_compute()
    place = len(compute.told)
    for stream in copier._lanes.values():
        assert stream.told[-1] == ("waits for", compute, place)


def test_closing_waits_and_unlocks(compute):
    copier, _, _ = copier_of(MIXED, 2, 2)
    copier.copy(PREFETCH_LANE, [(0, 0)])
    copier.close()
    stream = copier._lanes[PREFETCH_LANE]
    assert stream.num_passed == len(stream.told)
    assert copier._locked.num_closed == 1


def test_a_failed_copy_leaves_nothing_under_way(compute):
    copier, _, _ = copier_of(MIXED, 2, 2)
    with pytest.raises(IndexError):
        copier.copy(DEMAND_LANE, [(0, 0), (0, 2)])
    stream = copier._lanes[DEMAND_LANE]
    assert stream.num_passed == len(stream.told)
    assert not copier._events


def test_an_arena_of_other_records_is_refused(compute):
    pool = SlotPool(MIXED, 1)
    with pytest.raises(ValueError, match="arena must be contiguous"):
        TorchCopier(pool, np.zeros((2, 8), np.uint8), Locked())
