"""The tiers of a CUDA device, put together: what is open when a part of it fails."""

from __future__ import annotations

import pytest

from tests.stores import build, flip
from tests.streams_double import LockedDouble, StreamsDouble
from tests.transfers import assert_holds, kernel
from vllm_moe_offload.transfer import HostTier, TransferError, cuda
from vllm_moe_offload.transfer.cuda import cuda_transfer, filled_host_tier
from vllm_moe_offload.transfer.page_lock import PageLockError
from vllm_moe_offload.transfer.torch_copier import CopyError, TorchCopier


@pytest.fixture
def store(tmp_path):
    return build(tmp_path, num_layers=3, num_experts=4)


@pytest.fixture
def streams(monkeypatch):
    streams = StreamsDouble()
    monkeypatch.setattr(
        cuda, "TorchCopier", lambda pool, locked: TorchCopier(pool, locked, cuda=streams)
    )
    return streams


@pytest.fixture
def locked(monkeypatch):
    """The arenas that were locked, instead of locking them."""
    arenas = []

    def lock(arena):
        arenas.append(LockedDouble(arena))
        return arenas[-1]

    monkeypatch.setattr(cuda, "PageLocked", lock)
    return arenas


@pytest.fixture
def closed(monkeypatch):
    """Host tiers that were closed."""
    tiers = []
    close = HostTier.close

    def noted(host):
        tiers.append(host)
        close(host)

    monkeypatch.setattr(HostTier, "close", noted)
    return tiers


@pytest.mark.parametrize("host_slots", [2, 5, 1000])
def test_the_whole_way(store, streams, locked, host_slots):
    pool = streams.pool(store.layout, 4)
    said = []
    transfer = cuda_transfer(
        store,
        pool,
        host_slots=host_slots,
        verify=True,
        progress=lambda done, total: said.append((done, total)),
    )
    assert said[-1] == (min(host_slots, 12), min(host_slots, 12))
    assert transfer.expert_ns > 0
    assert_holds(store, streams.slots, 0, 0, 0)  # the copy whose time was taken
    for step in range(12):
        requests = [((step + i) % 3, (step * 3 + i) % 4, i) for i in range(3)]
        transfer.read(requests)
        kernel(store, streams, *requests)
        streams.synchronize()
    transfer.close()
    assert [arena.num_closed for arena in locked] == [1]


def test_a_filled_host_tier_is_locked_after_it_was_read(store, locked):
    host, arena = filled_host_tier(store, 1000)
    assert locked == [arena]
    assert arena.arena is host.arena
    assert host.holds_everything
    assert host.slots.find(2, 3) is not None
    host.close()


def test_a_record_that_cannot_be_read_locks_nothing(store, locked, closed):
    flip(store, 2, 3)
    with pytest.raises(TransferError, match=r"expert 3 of layer 2.*checksum"):
        filled_host_tier(store, 100, verify=True)
    assert locked == []
    assert len(closed) == 1


def test_memory_that_cannot_be_locked_ends_the_readers(store, closed, monkeypatch):
    def refuse(arena):
        raise PageLockError("no")

    monkeypatch.setattr(cuda, "PageLocked", refuse)
    with pytest.raises(PageLockError):
        filled_host_tier(store, 100)
    assert len(closed) == 1


def test_a_device_that_fails_leaves_nothing_locked(store, streams, locked, closed):
    streams.fail.add("copy_")
    with pytest.raises(CopyError, match="copying to the device failed"):
        cuda_transfer(store, streams.pool(store.layout, 4), host_slots=100)
    assert locked[0].num_closed >= 1
    assert len(closed) == 1
