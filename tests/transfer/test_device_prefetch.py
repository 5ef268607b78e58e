"""Prefetches onto a device: what waits for its turn, what is queued, what is dropped."""

from __future__ import annotations

import time

import pytest

from tests.device_double import DeviceError
from tests.runtimes import EXPERTS, LAYERS
from tests.stores import build, layout_of
from tests.transfers import ALL, assert_untouched, device_parts, kernel
from vllm_moe_offload.transfer import State
from vllm_moe_offload.transfer.copier import DEMAND_LANE, PREFETCH_LANE


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return build(tmp_path_factory.mktemp("device"), num_layers=LAYERS, num_experts=EXPERTS)


@pytest.fixture
def transfer_of(request):
    def make(store, host_slots=ALL, **options):
        transfer, device, host = device_parts(store, host_slots, **options)
        request.addfinalizer(transfer.close)
        return transfer, device, host

    return make


def test_few_prefetches_are_queued_at_a_time(store, transfer_of):
    transfer, device, _ = transfer_of(store)
    assert transfer.prefetch([(0, e, e) for e in range(8)]) == 8
    assert device.num_queued(PREFETCH_LANE) == 2
    transfer.prefetch([])
    assert device.num_queued(PREFETCH_LANE) == 2
    device.synchronize()
    assert {ended.slot for ended in transfer.poll()} == {0, 1}
    assert device.num_queued(PREFETCH_LANE) == 0  # a demand may come first
    transfer.prefetch([])
    assert device.num_queued(PREFETCH_LANE) == 2
    transfer.max_queued_prefetches = 4
    transfer.prefetch([])
    assert device.num_queued(PREFETCH_LANE) == 4
    transfer.drain()
    assert {ended.slot for ended in transfer.poll()} == set(range(2, 8))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        transfer.max_queued_prefetches = 0


def test_host_slots_are_left_to_demands(store, transfer_of):
    transfer, device, _ = transfer_of(store, 5)
    assert transfer.prefetch([(0, e, e) for e in range(6)]) == 2
    transfer.read([(1, 0, 6), (1, 1, 7)])
    kernel(store, device, (1, 0, 6), (1, 1, 7))
    transfer.drain()
    device.synchronize()
    assert {ended.slot for ended in transfer.poll()} == {0, 1}


def test_what_waits_can_be_dropped_and_what_is_queued_cannot(store, transfer_of):
    transfer, device, host = transfer_of(store)
    transfer.prefetch([(0, e, e) for e in range(5)])
    assert [transfer.drop(slot) for slot in range(5)] == [False, False, True, True, True]
    transfer.drain()
    assert {flight.slot: flight.state for flight in transfer.poll()} == {
        0: State.LANDED,
        1: State.LANDED,
    }
    assert host.slots.num_held == 0
    for slot in (2, 3, 4):
        assert_untouched(device.slots, slot)


def test_a_promoted_prefetch_is_copied_before_others(store, transfer_of):
    transfer, device, _ = transfer_of(store)
    transfer.prefetch([(0, e, e) for e in range(5)])
    transfer.promote(4)
    assert device.copied == [(PREFETCH_LANE, 0), (PREFETCH_LANE, 1), (DEMAND_LANE, 4)]
    transfer.promote(4)
    transfer.promote(0)
    assert len(device.copied) == 3
    transfer.await_slot(4)
    kernel(store, device, (0, 4, 4))
    transfer.drain()
    assert {ended.slot for ended in transfer.poll()} == {0, 1, 2, 3}
    device.synchronize()


@pytest.fixture(scope="module")
def slow_store(tmp_path_factory):
    """Records that one thread reads for a while: what is queued behind one waits."""
    return build(tmp_path_factory.mktemp("slow"), layout_of(32 << 20), 1, 3)


def begin_reading(transfer, host):
    assert transfer.prefetch([(0, 0, 0)]) == 1
    while not host.arena[:, :64].any():
        time.sleep(0.0001)


def test_a_dropped_read_is_cut_short_and_reported(slow_store, transfer_of):
    transfer, device, host = transfer_of(slow_store, 2, num_threads=1)
    begin_reading(transfer, host)
    assert not transfer.drop(0)
    transfer.drain()
    (ended,) = transfer.poll()
    assert ended.state is State.DROPPED  # also if the disk was faster: it was not copied
    assert device.copied == []
    assert host.slots.num_held == 0


def test_a_dropped_read_that_is_needed_after_all(slow_store, transfer_of):
    transfer, device, host = transfer_of(slow_store, 2, num_threads=1)
    begin_reading(transfer, host)
    assert not transfer.drop(0)
    transfer.promote(0)
    transfer.await_slot(0)
    kernel(slow_store, device, (0, 0, 0))
    device.synchronize()
    assert transfer.poll() == []
    assert host.slots.num_held == 0


def test_a_dropped_read_that_ended_and_is_needed_after_all(slow_store, transfer_of):
    """As of a layer that was passed without it and is called again before anybody polls."""
    transfer, device, host = transfer_of(slow_store, 2, num_threads=1)
    begin_reading(transfer, host)
    assert not transfer.drop(0)
    transfer.drain()  # it ended, and nobody was told
    transfer.await_slot(0)
    kernel(slow_store, device, (0, 0, 0))
    device.synchronize()
    assert transfer.poll() == []
    assert host.slots.num_held == 0


def test_a_demand_reads_while_a_prefetch_does(slow_store, transfer_of):
    transfer, device, host = transfer_of(slow_store, 2, num_threads=1)
    begin_reading(transfer, host)
    pending = transfer.begin_read([(0, 1, 1)])  # prefetches may hold one of two host slots
    assert transfer.prefetch([(0, 2, 2)]) == 0
    transfer.end_read(pending)
    kernel(slow_store, device, (0, 1, 1))
    device.synchronize()
    transfer.drain()
    assert [ended.slot for ended in transfer.poll()] == [0]


@pytest.mark.parametrize("method", ["after_compute", "copy"])
@pytest.mark.parametrize("host_slots", [8, ALL])
def test_a_failed_prefetch_call_is_forgotten(store, transfer_of, method, host_slots):
    transfer, device, host = transfer_of(store, host_slots, fill=True)
    device.fail.add(method)
    requests = [(0, 0, 0), (3, 7, 1), (1, 1, 2)]
    with pytest.raises(DeviceError):
        transfer.prefetch(requests)
    transfer.drain()
    assert transfer.poll() == []
    assert host.slots.num_held == device.num_tickets == 0
    assert transfer.prefetch(requests) == 3
    transfer.drain()
