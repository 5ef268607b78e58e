"""Transfers onto a device that a double stands for: every kernel finds the bytes it should."""

from __future__ import annotations

import os
import random

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
from tests.stores import build, flip
from tests.transfers import ALL, NUM_SLOTS, assert_holds, device_parts, kernel
from vllm_moe_offload.cache.planner import CacheShape, ExpertCache
from vllm_moe_offload.cache.pool import SlotPool
from vllm_moe_offload.policy import make_policy
from vllm_moe_offload.runtime import OffloadRuntime
from vllm_moe_offload.transfer import DeviceTransfer, HostTier, State, TransferError
from vllm_moe_offload.transfer.copier import DEMAND_LANE, PREFETCH_LANE
from vllm_moe_offload.transfer.prefetch import Prefetcher


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return build(tmp_path_factory.mktemp("device"), num_layers=LAYERS, num_experts=EXPERTS)


@pytest.fixture
def own_store(tmp_path):
    """A store to be damaged."""
    return build(tmp_path, num_layers=2, num_experts=4)


@pytest.fixture
def transfer_of(request):
    def make(store, host_slots=ALL, **options):
        transfer, device, host = device_parts(store, host_slots, **options)
        request.addfinalizer(transfer.close)
        return transfer, device, host

    return make


# ---- demand ------------------------------------------------------------------------------


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
    assert transfer.poll() == []  # and reaps
    assert host.slots.num_held == 0
    assert device.num_tickets == 0


def test_resident_experts_do_not_make_the_host_wait(store, transfer_of):
    transfer, device, host = transfer_of(store)
    file_bytes = host.files.read_bytes
    transfer.read([(0, 0, 0), (1, 1, 1)])
    assert device.num_queued(DEMAND_LANE) == 2  # queued, and nobody waited
    assert host.files.read_bytes == file_bytes
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
    transfer, device, host = transfer_of(store, 4)
    transfer.read([(0, 1, 0), (2, 2, 1)])
    before = host.files.read_bytes
    transfer.read([(0, 1, 3), (2, 2, 4)])
    assert host.files.read_bytes == before == 2 * store.layout.record_bytes
    kernel(store, device, (0, 1, 3), (2, 2, 4))
    device.synchronize()


def test_a_slot_is_not_overwritten_before_earlier_kernels_ran(store, transfer_of):
    for seed in range(20):
        transfer, device, _ = transfer_of(store, seed=seed)
        transfer.read([(0, 0, 0)])
        kernel(store, device, (0, 0, 0))
        transfer.read([(1, 3, 0)])
        kernel(store, device, (1, 3, 0))
        device.synchronize()


# ---- errors ------------------------------------------------------------------------------


def test_nothing_writes_into_slots_of_a_call_that_failed(own_store, transfer_of):
    transfer, device, host = transfer_of(own_store, 5)
    os.truncate(own_store.path, own_store.record_offset(1, 2))
    with pytest.raises(TransferError, match="expert 2 of layer 1"):
        transfer.read([(0, 0, 3), (1, 2, 4), (1, 1, 5), (1, 3, 6)])
    assert device.num_queued(DEMAND_LANE) == 0
    assert_holds(own_store, device.slots, 3, 0, 0)
    assert_holds(own_store, device.slots, 5, 1, 1)
    assert host.slots.num_held == device.num_tickets == 0


def test_a_flipped_byte_is_found_before_it_is_copied(own_store, transfer_of):
    flip(own_store, 1, 1)
    transfer, device, _ = transfer_of(own_store, 5)
    with pytest.raises(TransferError, match=r"expert 1 of layer 1.*checksum"):
        transfer.read([(1, 1, 0)])
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


@pytest.mark.parametrize("host_slots", [4, ALL])
def test_close_waits_for_copies(store, host_slots):
    transfer, device, _ = device_parts(store, host_slots)
    transfer.read([(3, e, e) for e in range(3)])
    transfer.prefetch([(2, e, 4 + e) for e in range(4)])
    transfer.close()
    transfer.close()
    assert device.closed
    assert device.num_queued(DEMAND_LANE) == device.num_queued(PREFETCH_LANE) == 0


# ---- any order of operations -------------------------------------------------------------


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
        self.transfer = DeviceTransfer(self.host, self.device)
        self.transfer.max_queued_prefetches = queued
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
            if finished.state is State.LANDED:
                self.holds[finished.slot] = expert
                assert_holds(self.store, self.device.slots, finished.slot, *expert)
            else:
                assert finished.state is State.DROPPED

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

    @rule(index=indices)
    def drop(self, index):
        slot = self.a_prefetch(index)
        if slot is not None and self.transfer.drop(slot):
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
                assert_holds(self.store, self.device.slots, slot, layer, expert)

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


# ---- under the runtime -------------------------------------------------------------------


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
    transfer, device, host = device_parts(store, host_slots, shape.num_pool_slots, seed)
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
                assert_holds(store, device.slots, slot, layer, expert)

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
