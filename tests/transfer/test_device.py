"""Transfers onto a device that a double stands for: every kernel finds the bytes it should."""

from __future__ import annotations

import functools
import os
import random
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from tests.device_double import DeviceError, SimulatedDevice
from tests.runtimes import EXPERTS, LAYERS, Foresight, decode_tokens, ids_of
from tests.stores import build, layer_tensors, layout_of
from vllm_moe_offload.cache.planner import CacheShape, ExpertCache
from vllm_moe_offload.cache.pool import SlotPool
from vllm_moe_offload.policy import make_policy
from vllm_moe_offload.runtime import OffloadRuntime
from vllm_moe_offload.transfer import DeviceTransfer, HostTier, TransferError
from vllm_moe_offload.transfer.copier import DEMAND_LANE, PREFETCH_LANE
from vllm_moe_offload.transfer.prefetch import Prefetcher

NUM_SLOTS = 8
ALL = 10_000

expected_layer = functools.lru_cache(maxsize=8)(layer_tensors)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return build(tmp_path_factory.mktemp("device"), num_layers=LAYERS, num_experts=EXPERTS)


@pytest.fixture
def own_store(tmp_path):
    """A store to be damaged."""
    return build(tmp_path, num_layers=2, num_experts=4)


def parts(store, host_slots=ALL, num_slots=NUM_SLOTS, seed=0, fill=None, **options):
    host = HostTier(store, host_slots, **options)
    if fill or (fill is None and host.holds_everything):
        host.fill()
    device = SimulatedDevice(store.layout, host.arena, num_slots, seed)
    return DeviceTransfer(host, device), device, host


@pytest.fixture
def transfer_of(request):
    def make(store, host_slots=ALL, **options):
        transfer, device, host = parts(store, host_slots, **options)
        request.addfinalizer(transfer.close)
        return transfer, device, host

    return make


def assert_holds(store, device, slot: int, layer: int, expert: int) -> None:
    tensors = expected_layer(store.layout, store.num_experts, layer)
    for name, wanted in tensors.items():
        assert (device.slots[name][slot] == wanted[expert]).all(), (name, slot, layer, expert)


def kernel(store, device, *requests):
    """Puts a kernel on the device that reads these slots; synchronise to have it checked."""

    def check():
        for layer, expert, slot in requests:
            assert_holds(store, device, slot, layer, expert)

    device.launch(check)


def wait_for_prefetches(transfer, count: int):
    ended = []
    deadline = time.monotonic() + 20
    while len(ended) < count and time.monotonic() < deadline:
        transfer.prefetch([])
        if transfer.has_news:
            ended += transfer.poll()
    return ended


# ---- demand --------------------------------------------------------------------------------


@pytest.mark.parametrize("host_slots", [2, 5, ALL])
@pytest.mark.parametrize("verify", [True, False])
def test_kernels_find_what_was_asked_for(store, transfer_of, host_slots, verify):
    transfer, device, host = transfer_of(store, host_slots, verify=verify)
    for step in range(20):
        requests = [(step % 4, (step + e) % 8, (step * 3 + e) % 8) for e in range(6)]
        transfer.read(requests)
        kernel(store, device, *requests)
    device.synchronize()
    assert transfer.read_bytes == 120 * store.layout.expert_bytes
    assert transfer.verify_failures == 0
    assert transfer.poll() == []  # and reaps
    assert host.slots.num_held == 0
    assert device.num_tickets == 0


def test_resident_experts_do_not_make_the_host_wait(store, transfer_of):
    transfer, device, _ = transfer_of(store)
    file_bytes = transfer.file_bytes
    transfer.read([(0, 0, 0), (1, 1, 1)])
    assert device.num_queued(DEMAND_LANE) == 2  # queued, and nobody waited
    assert transfer.file_bytes == file_bytes
    kernel(store, device, (0, 0, 0), (1, 1, 1))
    device.synchronize()


def test_copies_of_resident_experts_do_not_wait_for_files(store, transfer_of):
    transfer, device, _ = transfer_of(store, 8, fill=True)  # experts 0 and 1 of each layer
    pending = transfer.begin_read([(0, 0, 0), (0, 5, 1), (1, 1, 2)])
    assert sorted(slot for _, slot in device.copied) == [0, 2]
    transfer.end_read(pending)
    kernel(store, device, (0, 0, 0), (0, 5, 1), (1, 1, 2))
    device.synchronize()


def test_what_was_read_once_stays_in_host_memory(store, transfer_of):
    transfer, device, _ = transfer_of(store, 4)
    transfer.read([(0, 1, 0), (2, 2, 1)])
    before = transfer.file_bytes
    transfer.read([(0, 1, 3), (2, 2, 4)])
    assert transfer.file_bytes == before == 2 * store.layout.record_bytes
    kernel(store, device, (0, 1, 3), (2, 2, 4))
    device.synchronize()


def test_more_than_host_memory_holds_at_once(store, transfer_of):
    transfer, device, _ = transfer_of(store, 2, num_slots=32)
    requests = [
        (layer, expert, layer * 8 + expert) for layer in range(4) for expert in range(8)
    ]
    transfer.read(requests)
    kernel(store, device, *requests)
    device.synchronize()


def test_a_slot_is_not_overwritten_before_earlier_kernels_ran(store, transfer_of):
    for seed in range(20):
        transfer, device, _ = transfer_of(store, seed=seed)
        transfer.read([(0, 0, 0)])
        kernel(store, device, (0, 0, 0))
        transfer.read([(1, 3, 0)])
        kernel(store, device, (1, 3, 0))
        device.synchronize()


def test_reading_nothing(store, transfer_of):
    transfer, device, _ = transfer_of(store)
    transfer.read([])
    assert transfer.prefetch([]) == 0
    assert device.copied == []


# ---- prefetch ------------------------------------------------------------------------------


@pytest.mark.parametrize("host_slots", [6, ALL])
def test_prefetches_are_reported_once_they_are_there(store, transfer_of, host_slots):
    transfer, device, host = transfer_of(store, host_slots)
    requests = [(1, 4, 1), (2, 4, 2), (3, 7, 5)]
    assert transfer.prefetch(requests) == 3
    ended = wait_for_prefetches(transfer, 3)
    assert sorted((e.layer, e.expert, e.slot) for e in ended) == requests
    assert all(e.ok for e in ended)
    for layer, expert, slot in requests:
        assert_holds(store, device, slot, layer, expert)  # now, not later
    assert not transfer.has_news
    assert transfer.poll() == []
    assert host.slots.num_held == device.num_tickets == 0


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


def test_what_waits_can_be_cancelled_and_what_is_queued_cannot(store, transfer_of):
    transfer, device, host = transfer_of(store)
    transfer.prefetch([(0, e, e) for e in range(5)])
    assert not transfer.cancel(0)
    assert not transfer.drop(1)
    assert transfer.cancel(2)
    with pytest.raises(ValueError, match="slot 2 is not in flight"):
        transfer.cancel(2)
    assert transfer.drop(3)
    assert transfer.cancel_all() == [4]
    transfer.drain()
    assert sorted((e.slot, e.ok, e.dropped) for e in transfer.poll()) == [
        (0, True, False),
        (1, True, False),
    ]
    assert host.slots.num_held == 0
    for slot in (2, 3, 4):
        assert (device.slots["t0"][slot] == 0xEE).all()


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


@pytest.mark.parametrize("host_slots", [8, ALL])
def test_await_slot_takes_the_place_of_poll(store, transfer_of, host_slots):
    transfer, device, host = transfer_of(store, host_slots)
    transfer.prefetch([(0, e, e) for e in range(4)])
    transfer.await_slot(3)
    transfer.await_slot(0)
    kernel(store, device, (0, 3, 3), (0, 0, 0))
    device.synchronize()
    transfer.drain()
    transfer.await_slot(1)  # complete before it is awaited
    assert [ended.slot for ended in transfer.poll()] == [2]
    assert host.slots.num_held == 0
    for slot in (0, 1, 3):
        with pytest.raises(ValueError, match=f"slot {slot} is not in flight"):
            transfer.await_slot(slot)


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
    assert not transfer.cancel(0)
    assert not transfer.drop(0)
    transfer.drain()
    (ended,) = transfer.poll()
    assert ended.dropped
    assert not ended.ok  # also if the disk was faster: it was not copied
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


# ---- errors --------------------------------------------------------------------------------


def test_read_errors_name_file_and_slots_of_the_device(own_store, transfer_of):
    transfer, device, host = transfer_of(own_store, 5)
    os.truncate(own_store.path, own_store.record_offset(1, 2))
    with pytest.raises(TransferError) as caught:
        transfer.read([(0, 0, 3), (1, 2, 4), (1, 1, 5), (1, 3, 6)])
    message = str(caught.value)
    assert "expert 2 of layer 1" in message
    assert str(own_store.path) in message
    assert f"delete {own_store.directory}" in message
    assert "2 of 4 experts failed" in message
    assert caught.value.succeeded_slots == [3, 5]
    assert caught.value.failed_slots == [4, 6]
    assert device.num_queued(DEMAND_LANE) == 0  # nothing writes into slots that were given up
    assert_holds(own_store, device, 3, 0, 0)
    assert_holds(own_store, device, 5, 1, 1)
    assert host.slots.num_held == device.num_tickets == 0
    transfer.read([(0, 3, 4)])
    kernel(own_store, device, (0, 3, 4))
    device.synchronize()


def test_failed_prefetch_is_reported_with_its_reason(own_store, transfer_of):
    transfer, _, host = transfer_of(own_store, 5)
    os.truncate(own_store.path, own_store.record_offset(1, 2))
    transfer.prefetch([(1, 3, 0)])
    (ended,) = wait_for_prefetches(transfer, 1)
    assert not ended.ok
    assert not ended.dropped
    assert "expert 3 of layer 1" in ended.error
    transfer.prefetch([(1, 3, 0)])
    with pytest.raises(TransferError, match="expert 3 of layer 1") as caught:
        transfer.await_slot(0)
    assert caught.value.failed_slots == [0]
    assert transfer.poll() == []
    assert host.slots.num_held == 0


def test_verify_finds_a_flipped_byte_before_it_is_copied(own_store, transfer_of):
    content = bytearray(own_store.path.read_bytes())
    content[own_store.record_offset(1, 1) + 17] ^= 0x40
    own_store.path.write_bytes(content)
    transfer, device, _ = transfer_of(own_store, 5, verify=True)
    with pytest.raises(TransferError, match=r"expert 1 of layer 1.*checksum"):
        transfer.read([(1, 1, 0)])
    assert transfer.verify_failures == 1
    assert device.copied == []


@pytest.mark.parametrize("method", ["after_compute", "copy", "join"])
@pytest.mark.parametrize("host_slots", [4, ALL])
def test_device_errors_leave_nothing_under_way(store, transfer_of, method, host_slots):
    transfer, device, host = transfer_of(store, host_slots)
    requests = [(0, 0, 0), (0, 1, 1), (0, 2, 2)]
    device.fail.add(method)
    with pytest.raises(DeviceError, match=f"{method} failed"):
        transfer.read(requests)
    assert device.num_queued(DEMAND_LANE) == 0
    assert host.slots.num_held == device.num_tickets == 0
    transfer.read(requests)  # slots and experts are not in flight
    kernel(store, device, *requests)
    device.synchronize()


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


def test_impossible_requests(store, transfer_of):
    transfer, device, _ = transfer_of(store)
    for requests, message in [
        ([(0, 0, 0), (0, 1, 0)], "slot 0 is in flight"),
        ([(0, 0, 0), (0, 0, 1)], "to another slot"),
        ([(0, 0, NUM_SLOTS)], r"slot 8 is outside \[0, 8\)"),
        ([(LAYERS, 0, 0)], "no expert 0 in layer 4"),
    ]:
        for call in (transfer.begin_read, transfer.prefetch):
            with pytest.raises(ValueError, match=message):
                call(requests)
    assert device.copied == []
    pending = transfer.begin_read([(0, 0, 0)])
    for call in (transfer.await_slot, transfer.cancel, transfer.drop, transfer.promote):
        with pytest.raises(ValueError, match="slot 0 is in flight for a demand"):
            call(0)
    transfer.end_read(pending)
    with pytest.raises(ValueError, match="max_queued_prefetches must be at least 1, got 0"):
        DeviceTransfer(None, None, max_queued_prefetches=0)


@pytest.mark.parametrize("host_slots", [4, ALL])
def test_close(store, host_slots):
    transfer, device, _ = parts(store, host_slots)
    transfer.read([(3, e, e) for e in range(3)])
    transfer.prefetch([(2, e, 4 + e) for e in range(4)])
    transfer.close()
    transfer.close()
    assert device.closed
    assert device.num_queued(DEMAND_LANE) == device.num_queued(PREFETCH_LANE) == 0
    with pytest.raises(ValueError, match="closed"):
        transfer.read([(0, 0, 0)])
    with pytest.raises(ValueError, match="not in flight"):
        transfer.cancel(4)
    assert transfer.poll() == []
    transfer.drain()


# ---- any order of operations ---------------------------------------------------------------


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("name", ["read", "await_slot", "drain"])
def test_a_signal_leaves_nothing_under_way(store, transfer_of, monkeypatch, name):
    """As Ctrl-C in the middle of a wait for a file."""
    transfer, device, host = transfer_of(store, 8)
    transfer.prefetch([(0, 0, 0), (0, 1, 1)])
    interruptions = [1]
    collect = host.files._collect

    def interrupted(*arguments):
        ended = collect(*arguments)
        if interruptions:
            interruptions.pop()
            raise Interrupted
        return ended

    monkeypatch.setattr(host.files, "_collect", interrupted)
    requests = [(1, e, e + 2) for e in range(4)]
    call, arguments = {
        "read": (transfer.read, [requests]),
        "await_slot": (transfer.await_slot, [1]),
        "drain": (transfer.drain, []),
    }[name]
    with pytest.raises(Interrupted):
        call(*arguments)
    assert device.num_queued(DEMAND_LANE) == 0
    transfer.drain()
    assert sorted(ended.slot for ended in transfer.poll()) == [0, 1]
    assert host.slots.num_held == device.num_tickets == 0
    transfer.read(requests)
    kernel(store, device, *requests)
    device.synchronize()


class DeviceMachine(RuleBasedStateMachine):
    """Compares the transfer to what its documentation says about slots and kernels."""

    @initialize(
        host_slots=st.sampled_from([2, 3, 5, 9, ALL]),
        seed=st.integers(0, 1 << 16),
        fill=st.booleans(),
        queued=st.integers(1, 3),
    )
    def begin(self, host_slots, seed, fill, queued):
        self.host = HostTier(self.store, host_slots)
        if fill or self.host.holds_everything:
            self.host.fill()
        self.device = SimulatedDevice(self.store.layout, self.host.arena, NUM_SLOTS, seed)
        self.transfer = DeviceTransfer(self.host, self.device, max_queued_prefetches=queued)
        self.max_queued = queued
        self.pending = None
        self.demanded: list[tuple[int, int, int]] = []
        self.in_flight: dict[int, tuple[int, int]] = {}  # prefetches
        self.holds: dict[int, tuple[int, int]] = {}
        self.num_kernels = self.num_checked = 0

    experts = st.tuples(st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1))
    # What is in flight depends on how fast files are read: nothing drawn may depend on it.
    indices = st.integers(0, NUM_SLOTS - 1)
    requests = st.lists(
        st.tuples(experts, st.integers(0, NUM_SLOTS - 1)).map(lambda r: (*r[0], r[1])),
        max_size=4,
    )

    def is_refused(self, requests):
        slots = [slot for *_, slot in requests]
        experts = [(layer, expert) for layer, expert, _ in requests]
        taken = self.in_flight.keys() | {slot for *_, slot in self.demanded}
        moving = {*self.in_flight.values(), *((layer, e) for layer, e, _ in self.demanded)}
        return (
            len(set(slots)) < len(slots)
            or len(set(experts)) < len(experts)
            or taken & set(slots)
            or moving & set(experts)
        )

    @rule(requests=requests)
    def begin_read(self, requests):
        if self.pending is not None:
            return
        if self.is_refused(requests):
            with pytest.raises(ValueError, match="in flight"):
                self.transfer.begin_read(requests)
            return
        self.pending = self.transfer.begin_read(requests)
        self.demanded = requests
        for *_, slot in requests:
            self.holds.pop(slot, None)

    @rule()
    def end_read(self):
        if self.pending is None:
            return
        self.transfer.end_read(self.pending)
        for layer, expert, slot in self.demanded:
            self.holds[slot] = (layer, expert)
        self.pending, self.demanded = None, []

    @rule(requests=requests)
    def prefetch(self, requests):
        if self.is_refused(requests):
            with pytest.raises(ValueError, match="in flight"):
                self.transfer.prefetch(requests)
            return
        for layer, expert, slot in requests[: self.transfer.prefetch(requests)]:
            self.in_flight[slot] = (layer, expert)
            self.holds.pop(slot, None)

    @rule()
    def poll(self):
        for finished in self.transfer.poll():
            expert = self.in_flight.pop(finished.slot)
            assert expert == (finished.layer, finished.expert)
            if finished.ok:
                self.holds[finished.slot] = expert
                assert_holds(self.store, self.device, finished.slot, *expert)
            else:
                assert finished.dropped

    def a_prefetch(self, index):
        return sorted(self.in_flight)[index % len(self.in_flight)] if self.in_flight else None

    @rule(index=indices)
    def await_slot(self, index):
        slot = self.a_prefetch(index)
        if slot is None:
            return
        self.transfer.await_slot(slot)
        self.holds[slot] = self.in_flight.pop(slot)

    @rule(index=indices)
    def promote(self, index):
        slot = self.a_prefetch(index)
        if slot is not None:
            self.transfer.promote(slot)

    @rule(index=indices, name=st.sampled_from(["cancel", "drop"]))
    def give_up(self, index, name):
        slot = self.a_prefetch(index)
        if slot is not None and getattr(self.transfer, name)(slot):
            del self.in_flight[slot]

    @rule()
    def cancel_all(self):
        for slot in self.transfer.cancel_all():
            del self.in_flight[slot]

    @rule()
    def drain(self):
        self.transfer.drain()
        self.poll()
        assert not self.in_flight

    @rule(slots=st.sets(st.integers(0, NUM_SLOTS - 1)))
    def launch(self, slots):
        slots &= self.holds.keys()
        reads = [(*self.holds[slot], slot) for slot in slots]
        self.num_kernels += 1

        def check():
            self.num_checked += 1
            for layer, expert, slot in reads:
                assert_holds(self.store, self.device, slot, layer, expert)

        self.device.launch(check)

    @rule(count=st.integers(1, 6))
    def time_passes(self, count):
        for _ in range(count):
            self.device.step()

    @invariant()
    def few_prefetches_are_queued(self):
        if hasattr(self, "device"):
            assert self.device.num_queued(PREFETCH_LANE) <= self.max_queued + self.awaited

    awaited = NUM_SLOTS  # an awaited prefetch does not count against the queue any more

    def teardown(self):
        if not hasattr(self, "device"):
            return
        if self.pending is not None:
            self.end_read()
        self.drain()
        for slot, expert in self.holds.items():
            kernel(self.store, self.device, (*expert, slot))
        self.device.synchronize()
        assert self.num_checked == self.num_kernels
        self.transfer.poll()
        assert self.host.slots.num_held == self.device.num_tickets == 0
        self.transfer.close()


def test_any_order_of_operations(store):
    run_state_machine_as_test(
        type("Machine", (DeviceMachine,), {"store": store}),
        settings=settings(
            max_examples=120,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


# ---- under the runtime ---------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 1 << 16),
    host_slots=st.sampled_from([2, 6, 20, ALL]),
    slots=st.sampled_from([2, 6, 12, LAYERS * EXPERTS]),
)
def test_every_kernel_of_a_served_model_reads_its_experts(store, seed, host_slots, slots):
    chance = random.Random(seed)
    predictor = Foresight()
    policy = make_policy("trace", LAYERS, EXPERTS)
    shape = CacheShape(LAYERS, EXPERTS, slots, 4 if slots < LAYERS * EXPERTS else 0)
    cache = ExpertCache(shape, policy.rules)
    transfer, device, host = parts(store, host_slots, shape.num_pool_slots, seed)
    runtime = OffloadRuntime(
        cache=cache,
        pool=SlotPool(store.layout, 1),  # who reads slots is the double
        transfer=transfer,
        policy=policy,
        prefetcher=Prefetcher(cache, transfer, policy, predictor),
    )
    num_run = num_launched = 0

    def launch(layer, ids, slots):
        nonlocal num_launched
        requests = list(zip(ids.tolist(), slots.tolist(), strict=True))
        num_launched += 1

        def check():
            nonlocal num_run
            num_run += 1
            for expert, slot in requests:
                assert_holds(store, device, slot, layer, expert)

        device.launch(check)

    if shape.holds_everything:
        runtime.load_everything()
    for _ in range(12):
        predictor.likely[:] = np.random.default_rng(chance.randrange(1 << 30)).random(
            (LAYERS, EXPERTS)
        )
        runtime.begin_step(decode_tokens(["a", "b", "c"]))
        for layer in range(LAYERS):
            ids = torch.cat([ids_of(*chance.sample(range(EXPERTS), 2)) for _ in range(3)])
            slots = runtime.begin_layer(layer, ids)
            if slots is None:
                for wave_slots, in_wave in runtime.waves(layer, ids):
                    launch(layer, ids[in_wave], wave_slots[in_wave])
                continue
            offset = layer * EXPERTS if shape.holds_everything else 0
            launch(layer, ids.reshape(-1), slots.reshape(-1) + offset)
            runtime.end_layer(layer)
            for _ in range(chance.randrange(4)):
                device.step()
    runtime.prefetcher.settle()
    device.synchronize()
    assert num_run == num_launched > 0
    transfer.poll()
    assert host.slots.num_held == device.num_tickets == 0
    runtime.close()
