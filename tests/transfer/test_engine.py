"""The transfer engine beyond the contract: its file, its threads, and what it does with a queue."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from tests.forks import in_a_fork
from tests.stores import MIXED, aligned, build, identity, layout_of, slots_for
from tests.transfers import NUM_SLOTS, Interrupted, assert_holds
from vllm_moe_offload.native import NativeError
from vllm_moe_offload.store import ExpertStore
from vllm_moe_offload.transfer import State, TransferEngine, TransferError, record_reader


class CoreProxy:
    """The native core, with some functions replaced by a subclass."""

    def __init__(self, core):
        self.core = core

    def __getattr__(self, name):
        return getattr(self.core, name)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ExpertStore:
    return build(tmp_path_factory.mktemp("transfer"), num_layers=4, num_experts=8)


@pytest.fixture(scope="module")
def big_store(tmp_path_factory) -> ExpertStore:
    """Records that take a single thread milliseconds to read."""
    return build(tmp_path_factory.mktemp("big"), layout_of(8 << 20, 100), 1, 4)


@pytest.fixture(scope="module")
def slow_store(tmp_path_factory) -> ExpertStore:
    """Two layers of one huge record: what is queued behind one waits, however busy the
    machine is. The file is sparse, so that no disk is needed."""
    layout = layout_of(128 << 20)
    directory = tmp_path_factory.mktemp("slow")
    zeros = xxhash.xxh3_64_intdigest(bytes(layout.record_bytes))
    store = ExpertStore(directory, identity(), layout, 2, 2, ((zeros, zeros), (zeros, zeros)))
    store.path.touch()
    os.truncate(store.path, store.file_bytes)
    return store


@pytest.fixture
def slow_engine(slow_store):
    """An engine of one thread over ``slow_store``, and its slots, which begin with 0xEE."""
    slots = {"t0": aligned(4 * (128 << 20)).reshape(4, -1)}
    slots["t0"][:, :8] = 0xEE
    engine = TransferEngine(slow_store, slots, num_threads=1)
    yield engine, slots["t0"]
    engine.close()


SLOW_EXPERTS = [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.fixture
def own_store(tmp_path) -> ExpertStore:
    """A store to be damaged."""
    return build(tmp_path, num_layers=2, num_experts=4)


@pytest.fixture
def engine_of(request):
    """Makes engines that are closed at the end of the test."""

    def make(store, num_slots=NUM_SLOTS, **options):
        slots = slots_for(store.layout, num_slots)
        engine = TransferEngine(store, slots, **options)
        request.addfinalizer(engine.close)
        return engine, slots

    return make


# ---- bytes -------------------------------------------------------------------------------


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    sizes=st.lists(
        st.one_of(st.integers(1, 20_000), st.sampled_from([4096, 40960])),
        min_size=1,
        max_size=6,
    ),
    direct=st.booleans(),
)
def test_any_mix_of_direct_and_tail_tensors(tmp_path, sizes, direct):
    shutil.rmtree(tmp_path)
    store = build(tmp_path, layout_of(*sizes), num_layers=2, num_experts=3)
    slots = slots_for(store.layout, 6)
    engine = TransferEngine(store, slots, direct=direct, verify=True)
    requests = [(slot % 2, slot // 2, slot) for slot in range(6)]
    engine.read(requests)
    engine.close()
    for layer, expert, slot in requests:
        assert_holds(store, slots, slot, layer, expert)


def test_tail_of_many_megabytes(tmp_path, engine_of):
    store = build(tmp_path, layout_of((17 << 20) + 1), num_layers=1, num_experts=6)
    engine, slots = engine_of(store, num_slots=6)
    engine.read([(0, expert, expert) for expert in range(6)])
    for expert in range(6):
        assert_holds(store, slots, expert, 0, expert)


def test_reads_are_waited_for_one_by_one_while_they_are_checked(store, engine_of, monkeypatch):
    """Checking one overlaps with reading the next; without checks one wake-up is enough."""
    engine, _ = engine_of(store)
    waited_for = []
    collect = engine._collect

    def spy(timeout_ms, min_count=1):
        waited_for.append(min_count)
        return collect(timeout_ms, min_count)

    monkeypatch.setattr(engine, "_collect", spy)
    requests = [(0, expert, expert) for expert in range(4)]
    engine.read(requests)
    assert set(waited_for) == {1}
    waited_for.clear()
    engine.read(requests)
    assert waited_for[0] == 4
    waited_for.clear()
    engine.read([(0, 0, 0), (1, 0, 1)])
    assert waited_for[0] == 1


# ---- what waits in the queue -------------------------------------------------------------


def test_await_slot_goes_before_other_prefetches(slow_engine):
    engine, slots = slow_engine
    for slot, expert in enumerate(SLOW_EXPERTS[:3]):
        engine.prefetch([(*expert, slot)])
    engine.await_slot(2)
    assert not slots[2].any()
    # The second has not ended; the first may have, if nobody woke this thread for long.
    assert {flight.slot for flight in engine.poll()} <= {0}


def test_what_has_not_begun_is_dropped_at_once(slow_engine):
    engine, slots = slow_engine
    engine.prefetch([(*expert, slot) for slot, expert in enumerate(SLOW_EXPERTS)])
    assert engine.drop(3)
    freed = [slot for slot in range(3) if engine.drop(slot)]
    assert freed  # one thread reads one of them at a time
    assert engine.prefetch([(*SLOW_EXPERTS[3], freed[0])]) == 1
    engine.drain()
    ended = {flight.slot: flight.state for flight in engine.poll()}
    assert ended.pop(freed[0]) is State.LANDED
    assert ended.keys() == {0, 1, 2} - set(freed)
    for slot in (3, *freed[1:]):
        assert (slots[slot, :8] == 0xEE).all()


def test_a_dropped_prefetch_is_cut_short(slow_engine):
    engine, slots = slow_engine
    engine.prefetch([(0, 0, 0)])
    while slots[0, 0] == 0xEE:
        time.sleep(0.0001)
    assert not engine.drop(0)
    engine.drain()
    (ended,) = engine.poll()
    assert ended.state in (State.DROPPED, State.LANDED)  # the disk may have been faster
    engine.read([(0, 0, 0)])
    assert not slots[0].any()


def test_a_dropped_prefetch_that_is_needed_after_all(slow_engine):
    engine, slots = slow_engine
    engine.prefetch([(0, 0, 0)])
    while slots[0, 0] == 0xEE:
        time.sleep(0.0001)
    slots[0, -8:] = 0xEE
    assert not engine.drop(0)
    engine.await_slot(0)
    assert not slots[0].any()
    assert engine.poll() == []


# ---- errors ------------------------------------------------------------------------------


def test_store_that_vanished_or_changed_size(own_store):
    slots = slots_for(MIXED, 1)
    os.truncate(own_store.path, 4096)
    with pytest.raises(TransferError, match="4096 bytes instead of"):
        TransferEngine(own_store, slots)
    own_store.path.unlink()
    with pytest.raises(TransferError, match=r"experts\.bin.*No such file"):
        TransferEngine(own_store, slots)


def test_impossible_cores_are_an_error(store):
    with pytest.raises(TransferError, match="bind"):
        TransferEngine(store, slots_for(MIXED, 1), cpus=[100_000])


def test_destinations_are_checked(store):
    good = slots_for(MIXED, 4)
    read_only = good["t1"].copy()
    read_only.flags.writeable = False
    for bad, message in [
        ({"t0": good["t0"]}, "are not"),
        (good | {"t1": good["t1"][:2]}, "t1 must be uint8"),
        (good | {"t1": good["t1"].view(np.int8)}, "t1 must be uint8"),
        (good | {"t0": aligned(4 * 8192 + 64)[64:].reshape(4, 8192)}, "t0 must begin"),
        (good | {"t1": np.zeros((4, 200), np.uint8)[:, ::2]}, "t1 must be contiguous"),
        (good | {"t1": read_only}, "writeable"),
    ]:
        with pytest.raises(ValueError, match=message):
            TransferEngine(store, bad)


def test_refused_o_direct_falls_back_with_a_warning(store, engine_of, monkeypatch, caplog):
    class RefusesDirect(CoreProxy):
        def vmo_reader_open(self, paths, num_paths, direct, *arguments):
            if direct:  # what a file system without O_DIRECT does
                paths[0] = b"/proc/self/status"
            return self.core.vmo_reader_open(paths, num_paths, direct, *arguments)

    monkeypatch.setattr(record_reader, "core", RefusesDirect(record_reader.core))
    with caplog.at_level(logging.WARNING, "vllm.moe_offload"):
        engine, slots = engine_of(store)
    assert not engine.direct
    assert "O_DIRECT" in caplog.text
    assert "page cache" in caplog.text
    engine.read([(0, 0, 0)])
    assert_holds(store, slots, 0, 0, 0)


# ---- threads -----------------------------------------------------------------------------


def reader_threads() -> int:
    tasks = Path("/proc/self/task").iterdir()
    return sum((task / "comm").read_text().strip() == "vmo-reader" for task in tasks)


def test_close_ends_the_threads(big_store):
    before = reader_threads()
    engine = TransferEngine(big_store, slots_for(big_store.layout, 4), num_threads=3)
    assert reader_threads() == before + 3
    for expert in range(4):
        engine.prefetch([(0, expert, expert)])
    engine.close()
    engine.close()
    assert reader_threads() == before


def test_a_forgotten_engine_ends_its_threads(store):
    before = reader_threads()
    engine = TransferEngine(store, slots_for(MIXED, 1))
    assert reader_threads() > before
    del engine
    assert reader_threads() == before


def test_an_engine_of_the_parent_is_closed_or_forgotten_in_a_fork(store):
    engine = TransferEngine(store, slots_for(MIXED, 1))

    def read_and_close():
        with pytest.raises(NativeError, match="forked"):
            engine.read([(0, 0, 0)])
        engine.close()

    def forget():
        nonlocal engine
        del engine
        gc.collect()

    in_a_fork(read_and_close)
    in_a_fork(forget)
    engine.read([(0, 0, 0)])
    engine.close()


def test_a_signal_during_a_read_leaves_nothing_in_flight(slow_engine, monkeypatch):
    class Signalled(CoreProxy):
        """The first wait is short, and gets a signal, whether the machine is fast or slow."""

        is_signalled = False

        def vmo_reader_wait(self, *arguments):
            if self.is_signalled:
                return self.core.vmo_reader_wait(*arguments)
            self.is_signalled = True
            signal.setitimer(signal.ITIMER_REAL, 0.002)
            *others, _ = arguments
            self.core.vmo_reader_wait(*others, 5)
            time.sleep(60)  # the signal came after the wait, then it comes here
            raise AssertionError("no signal came")

    def interrupt(*_):
        raise Interrupted

    engine, slots = slow_engine
    monkeypatch.setattr(record_reader, "core", Signalled(record_reader.core))
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(Interrupted):
            engine.read([(*expert, slot) for slot, expert in enumerate(SLOW_EXPERTS)])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert not slots[:, :8].any()  # what had begun, and what was queued, was waited for
    slots[:, :8] = 0xEE
    engine.read([(*SLOW_EXPERTS[0], 3)])
    assert (slots[:3, :8] == 0xEE).all()
    assert not slots[3, :8].any()


@pytest.mark.parametrize("name", ["read", "await_slot"])
def test_ends_that_an_interrupted_wait_had_taken(store, engine_of, monkeypatch, name):
    class InterruptedOnce(CoreProxy):
        interruptions = 1

        def vmo_reader_wait(self, *arguments):
            count = self.core.vmo_reader_wait(*arguments)
            if self.interruptions:
                self.interruptions -= 1
                raise Interrupted
            return count

    engine, slots = engine_of(store)
    engine.prefetch([(0, 0, 0)])
    engine.prefetch([(0, 1, 1)])
    monkeypatch.setattr(record_reader, "core", InterruptedOnce(record_reader.core))
    call, argument = {
        "read": (engine.read, [(1, expert, expert + 2) for expert in range(4)]),
        "await_slot": (engine.await_slot, 1),
    }[name]
    with pytest.raises(Interrupted):
        call(argument)
    engine.drain()
    assert sorted(ended.slot for ended in engine.poll()) == [0, 1]
    for _ in range(100):  # no ticket is lost
        engine.read([(2, expert, expert) for expert in range(8)])
    assert_holds(store, slots, 7, 2, 7)


def test_waiting_releases_the_interpreter(slow_engine):
    engine, _ = slow_engine
    stop, turns = threading.Event(), []

    def count():
        while not stop.is_set():
            turns.append(1)
            time.sleep(0.0005)

    thread = threading.Thread(target=count)
    thread.start()
    before = len(turns)
    engine.read([(*SLOW_EXPERTS[0], 0)])
    during = len(turns) - before
    stop.set()
    thread.join()
    assert during >= 2


# ---- any order of operations -------------------------------------------------------------


class EngineMachine(RuleBasedStateMachine):
    """Compares the engine to what its documentation says about slots."""

    store: ExpertStore
    prefetched = Bundle("prefetched")

    @initialize(threads=st.integers(1, 4), direct=st.booleans(), verify=st.booleans())
    def begin(self, threads, direct, verify):
        self.slots = slots_for(self.store.layout, NUM_SLOTS)
        self.engine = TransferEngine(
            self.store, self.slots, num_threads=threads, direct=direct, verify=verify
        )
        self.in_flight: dict[int, tuple[int, int]] = {}
        self.holds: dict[int, tuple[int, int]] = {}

    experts = st.tuples(st.integers(0, 3), st.integers(0, 7))

    def is_refused(self, requests):
        slots = [slot for *_, slot in requests]
        experts = [(layer, expert) for layer, expert, _ in requests]
        return (
            len(set(slots)) < len(slots)
            or len(set(experts)) < len(experts)
            or self.in_flight.keys() & set(slots)
            or set(self.in_flight.values()) & set(experts)
        )

    @rule(
        requests=st.lists(
            st.tuples(experts, st.integers(0, NUM_SLOTS - 1)).map(lambda r: (*r[0], r[1])),
            max_size=4,
        )
    )
    def read(self, requests):
        if self.is_refused(requests):
            with pytest.raises(ValueError, match="in flight"):
                self.engine.read(requests)
            return
        self.engine.read(requests)
        for layer, expert, slot in requests:
            self.holds[slot] = (layer, expert)

    @rule(target=prefetched, expert=experts, slot=st.integers(0, NUM_SLOTS - 1))
    def prefetch(self, expert, slot):
        if self.is_refused([(*expert, slot)]):
            with pytest.raises(ValueError, match="in flight"):
                self.engine.prefetch([(*expert, slot)])
        else:
            assert self.engine.prefetch([(*expert, slot)])
            self.in_flight[slot] = expert
        return slot

    def ended(self, slot):
        self.holds[slot] = self.in_flight.pop(slot)

    @rule()
    def poll(self):
        for finished in self.engine.poll():
            assert finished.state in (State.LANDED, State.DROPPED)
            assert self.in_flight[finished.slot] == (finished.layer, finished.expert)
            if finished.state is State.LANDED:
                self.ended(finished.slot)
            else:
                del self.in_flight[finished.slot]

    @rule(slot=consumes(prefetched))
    def await_slot(self, slot):
        if slot in self.in_flight:
            self.engine.await_slot(slot)
            self.ended(slot)

    @rule(slot=consumes(prefetched))
    def drop(self, slot):
        if slot in self.in_flight and self.engine.drop(slot):
            del self.in_flight[slot]

    @rule()
    def drain(self):
        self.engine.drain()
        self.poll()
        assert not self.in_flight

    @invariant()
    def slots_hold_their_experts(self):
        for slot, expert in self.holds.items():
            if slot not in self.in_flight:
                assert_holds(self.store, self.slots, slot, *expert)

    def teardown(self):
        if hasattr(self, "engine"):
            self.drain()
            self.slots_hold_their_experts()
            self.engine.close()


def test_any_order_of_operations(store):
    run_state_machine_as_test(
        type("Machine", (EngineMachine,), {"store": store}),
        settings=settings(
            max_examples=40,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
