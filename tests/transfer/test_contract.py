"""What ``Transfer`` promises, of every transfer there is."""

from __future__ import annotations

import os
import shutil
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stores import MIXED, build, build_joined, flip, layout_of
from tests.transfers import HOST_SLOTS, NUM_SLOTS, Interrupted, rig_of, wait_for_prefetches
from vllm_moe_offload.plan.shapes import FORMATS, ExpertShape, kernel_form, refusals
from vllm_moe_offload.store import DamagedStore, open_store
from vllm_moe_offload.transfer import State, TransferError

READ_FILES = [kind for kind in HOST_SLOTS if kind != "out of host memory"]
"""Whose calls read the store's file; the others have read all of it before the first."""


@pytest.fixture(scope="module", params=[(4,), (3, 1)], ids=["one file", "two files"])
def store(request, tmp_path_factory):
    return build_joined(tmp_path_factory.mktemp("contract"), MIXED, request.param, 8)


@pytest.fixture(scope="module")
def big_store(tmp_path_factory):
    """Records that a thread reads for milliseconds."""
    return build(tmp_path_factory.mktemp("big"), layout_of(16 << 20, 100), 1, 8)


@pytest.fixture
def own_store(tmp_path):
    """A store to be damaged."""
    return build(tmp_path, num_layers=2, num_experts=4)


@pytest.fixture(params=HOST_SLOTS)
def rig_over(request):
    """Makes rigs of one kind, which are closed at the end of the test."""

    def make(store, *arguments, **options):
        rig = rig_of(request.param, store, *arguments, **options)
        request.addfinalizer(rig.transfer.close)
        return rig

    return make


reading_files = pytest.mark.parametrize("rig_over", READ_FILES, indirect=True)


# ---- demand --------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [True, False])
def test_slots_hold_what_was_asked_for(store, rig_over, verify):
    rig = rig_over(store, verify=verify)
    requests = [(0, 3, 5), (3, 0, 0), (2, 7, 7), (1, 1, 2)]
    rig.transfer.end_read(rig.transfer.begin_read(requests))
    rig.assert_kernels_find(*requests)
    rig.assert_untouched(1, 3, 4, 6)
    assert MIXED.expert_bytes <= rig.transfer.read_bytes / 4 <= MIXED.record_bytes
    rig.assert_nothing_is_under_way()


row_bytes = st.one_of(st.integers(1, 9000), st.sampled_from([4, 4096, 12288]))
KERNEL_FORMS = [
    kernel_form(known, platform, expert)
    for expert in (ExpertShape(256, 128), ExpertShape(256, 128, True, "swigluoai"))
    for known in FORMATS
    for platform in ("cpu", "cuda")
    if not any(refusals(known, platform, expert))
]
layouts = st.one_of(
    st.lists(row_bytes, min_size=1, max_size=12).map(lambda sizes: layout_of(*sizes)),
    st.sampled_from(KERNEL_FORMS),
)


@pytest.mark.parametrize("kind", HOST_SLOTS)
@settings(max_examples=15, deadline=None)
@given(layout=layouts, data=st.data())
def test_an_expert_may_have_any_tensors(tmp_path_factory, kind, layout, data):
    """One or a dozen, whole pages or four bytes, and every form of vLLM's kernels."""
    store = build(tmp_path_factory.mktemp("layouts"), layout, num_layers=2, num_experts=4)
    experts = st.tuples(st.integers(0, 1), st.integers(0, 3))
    wanted = data.draw(st.lists(experts, min_size=1, max_size=NUM_SLOTS, unique=True))
    requests = [(layer, expert, slot) for slot, (layer, expert) in enumerate(wanted)]
    rig = rig_of(kind, store, verify=True)
    try:
        rig.transfer.read(requests)
        rig.assert_kernels_find(*requests)
        rig.assert_untouched(*range(len(requests), NUM_SLOTS))
    finally:
        rig.transfer.close()
        shutil.rmtree(store.path.parent)


def test_slots_can_be_used_again(store, rig_over):
    rig = rig_over(store)
    for step in range(20):
        requests = [(step % 4, (step + e) % 8, (step * 3 + e) % 8) for e in range(6)]
        rig.transfer.read(requests)
        rig.assert_kernels_find(*requests)
    rig.assert_nothing_is_under_way()


def test_nothing_to_read(store, rig_over):
    rig = rig_over(store)
    rig.transfer.read([])
    assert rig.transfer.prefetch([]) == 0
    assert rig.transfer.read_bytes == 0
    rig.assert_nothing_is_under_way()


def test_more_than_can_be_under_way_at_once(tmp_path, rig_over):
    store = build(tmp_path, num_layers=1, num_experts=300)
    rig = rig_over(store, 300, verify=True)
    requests = [(0, expert, 299 - expert) for expert in range(300)]
    rig.transfer.read(requests)
    rig.assert_kernels_find(*requests)


# ---- prefetch ------------------------------------------------------------------------------


def test_a_prefetch_is_reported_once_it_is_there(store, rig_over):
    rig = rig_over(store)
    requests = [(1, 4, 1), (2, 4, 2), (3, 7, 5)]
    assert rig.transfer.prefetch(requests) == 3
    ended = wait_for_prefetches(rig.transfer, 3)
    assert sorted((e.layer, e.expert, e.slot) for e in ended) == requests
    assert {flight.state for flight in ended} == {State.LANDED}
    rig.assert_kernels_find(*requests)
    rig.assert_nothing_is_under_way()
    assert rig.transfer.prefetch(requests[:1]) == 1  # not in flight any more
    rig.transfer.drain()
    assert rig.transfer.has_news
    assert [flight.slot for flight in rig.transfer.poll()] == [1]


def test_prefetches_that_end_during_a_demand_are_not_lost(store, rig_over):
    rig = rig_over(store, num_threads=1)
    prefetches = [(0, expert, expert) for expert in range(3)]
    assert rig.transfer.prefetch(prefetches) == 3
    rig.transfer.read([(1, 0, 7)])
    rig.assert_kernels_find((1, 0, 7))
    rig.transfer.drain()
    assert sorted(flight.slot for flight in rig.transfer.poll()) == [0, 1, 2]
    rig.assert_kernels_find(*prefetches)


def test_what_is_declined_is_not_in_flight(tmp_path, rig_over):
    store = build(tmp_path, num_layers=1, num_experts=100)
    rig = rig_over(store, 100)
    requests = [(0, expert, expert) for expert in range(100)]
    begun = rig.transfer.prefetch(requests)
    assert begun >= 3
    if begun < 100:
        rig.assert_untouched(99)
        rig.transfer.read(requests[-1:])  # others wait, and a demand is served
        rig.assert_kernels_find(requests[-1])
    rig.transfer.drain()
    assert sorted(flight.slot for flight in rig.transfer.poll()) == list(range(begun))
    rig.assert_kernels_find(*requests[:begun])


def test_await_slot_takes_the_place_of_poll(store, rig_over):
    rig = rig_over(store)
    rig.transfer.prefetch([(0, 1, 3), (0, 2, 4), (0, 3, 5)])
    rig.transfer.promote(4)
    rig.transfer.await_slot(4)
    rig.assert_kernels_find((0, 2, 4))
    rig.transfer.drain()
    rig.transfer.promote(3)  # too late, and no harm
    rig.transfer.await_slot(3)
    rig.assert_kernels_find((0, 1, 3))
    assert [flight.slot for flight in rig.transfer.poll()] == [5]
    for slot in (3, 4):
        with pytest.raises(ValueError, match=f"slot {slot} is not in flight"):
            rig.transfer.await_slot(slot)
    rig.assert_nothing_is_under_way()


def test_a_dropped_slot_is_free_or_will_be_reported(big_store, rig_over):
    rig = rig_over(big_store, num_threads=1)
    begun = rig.transfer.prefetch([(0, expert, expert) for expert in range(6)])
    rig.wait_until_begun(0)
    freed = [slot for slot in reversed(range(begun)) if rig.transfer.drop(slot)]
    for slot in freed:
        with pytest.raises(ValueError, match=f"slot {slot} is not in flight"):
            rig.transfer.drop(slot)
    rig.transfer.drain()
    ended = rig.transfer.poll()
    assert sorted([*freed, *(flight.slot for flight in ended)]) == list(range(begun))
    assert {flight.state for flight in ended} <= {State.LANDED, State.DROPPED}
    rig.assert_untouched(*freed)
    rig.assert_kernels_find(
        *((0, flight.slot, flight.slot) for flight in ended if flight.state is State.LANDED)
    )
    again = [(0, 7 - slot, slot) for slot in range(4)]
    rig.transfer.read(again)
    rig.assert_kernels_find(*again)
    rig.assert_nothing_is_under_way()


@pytest.mark.parametrize("ended", [False, True])
def test_a_dropped_prefetch_that_is_wanted_again(big_store, rig_over, ended):
    rig = rig_over(big_store, num_threads=1)
    wanted = [(0, expert, expert) for expert in range(3)]
    assert rig.transfer.prefetch(wanted) == 3
    if not ended:
        rig.wait_until_begun(0)
        wanted = [request for request in wanted if not rig.transfer.drop(request[2])]
    else:
        rig.transfer.drain()
        assert not any(rig.transfer.drop(slot) for *_, slot in wanted)
    for *_, slot in wanted:
        assert not rig.transfer.drop(slot)  # said before
        rig.transfer.promote(slot)
        rig.transfer.await_slot(slot)
    rig.assert_kernels_find(*wanted)
    rig.assert_nothing_is_under_way()


# ---- in flight means hands off -------------------------------------------------------------


def test_a_slot_in_flight_is_refused(big_store, rig_over):
    rig = rig_over(big_store, num_threads=1)
    rig.transfer.prefetch([(0, 0, 0)])
    for call in (rig.transfer.prefetch, rig.transfer.begin_read):
        with pytest.raises(ValueError, match="slot 0 is in flight for expert 0 of layer 0"):
            call([(0, 1, 0)])
    rig.transfer.drain()
    with pytest.raises(ValueError, match="slot 0 is in flight"):
        rig.transfer.begin_read([(0, 1, 0)])  # ended, but nobody was told
    rig.transfer.poll()
    rig.transfer.read([(0, 1, 0)])
    rig.assert_kernels_find((0, 1, 0))


def test_an_expert_in_flight_is_refused(big_store, rig_over):
    rig = rig_over(big_store, num_threads=1)
    rig.transfer.prefetch([(0, 0, 0)])
    with pytest.raises(ValueError, match="expert 0 of layer 0 is in flight to another slot"):
        rig.transfer.begin_read([(0, 1, 2), (0, 0, 1)])
    rig.assert_untouched(1, 2)
    rig.transfer.await_slot(0)
    rig.transfer.read([(0, 1, 2), (0, 0, 1)])  # the refused call left nothing in flight


def test_a_demand_is_no_prefetch(store, rig_over):
    rig = rig_over(store)
    pending = rig.transfer.begin_read([(0, 0, 0)])
    for call in (rig.transfer.await_slot, rig.transfer.drop, rig.transfer.promote):
        with pytest.raises(ValueError, match="slot 0 is in flight for a demand"):
            call(0)
    rig.transfer.end_read(pending)
    for call in (rig.transfer.await_slot, rig.transfer.drop, rig.transfer.promote):
        with pytest.raises(ValueError, match="slot 0 is not in flight"):
            call(0)


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([(0, 0, 0), (0, 1, 0)], "slot 0 is in flight"),
        ([(0, 0, 0), (0, 0, 1)], "to another slot"),
        ([(0, 0, NUM_SLOTS)], r"slot 8 is outside \[0, 8\)"),
        ([(0, 0, -1)], "slot -1 is outside"),
        ([(4, 0, 0)], "no expert 0 in layer 4"),
        ([(0, 8, 0)], "no expert 8 in layer 0"),
        ([(0, -1, 0)], "no expert -1"),
    ],
)
def test_impossible_requests_begin_nothing(store, rig_over, requests, message):
    rig = rig_over(store)
    for call in (rig.transfer.begin_read, rig.transfer.prefetch):
        with pytest.raises(ValueError, match=message):
            call(requests)
    rig.assert_nothing_is_under_way()
    assert rig.transfer.read_bytes == 0
    rig.assert_untouched(*range(NUM_SLOTS))
    rig.transfer.read([(0, 0, 0), (0, 1, 1)])


# ---- errors --------------------------------------------------------------------------------


@reading_files
def test_an_error_names_file_expert_reason_and_remedy(own_store, rig_over):
    rig = rig_over(own_store)
    os.truncate(own_store.path, own_store.record_offset(1, 2))
    with pytest.raises(TransferError) as caught:
        rig.transfer.read([(0, 0, 3), (1, 2, 4), (1, 1, 5), (1, 3, 6)])
    message = str(caught.value)
    assert "expert 2 of layer 1" in message
    assert str(own_store.path) in message
    assert "ends too early" in message
    assert "builds a damaged store again" in message
    assert "2 of 4 experts failed" in message
    rig.assert_nothing_is_under_way()
    again = [(0, 3, 4), (0, 0, 3), (1, 1, 6)]
    rig.transfer.read(again)  # the next call is served
    rig.assert_kernels_find(*again)


@reading_files
def test_a_failed_prefetch_is_reported_with_its_reason(own_store, rig_over):
    rig = rig_over(own_store)
    os.truncate(own_store.path, own_store.record_offset(1, 2))
    rig.transfer.prefetch([(1, 3, 0)])
    (ended,) = wait_for_prefetches(rig.transfer, 1)
    assert ended.state is State.FAILED
    assert "expert 3 of layer 1" in ended.error
    rig.transfer.prefetch([(1, 3, 0)])
    with pytest.raises(TransferError, match="expert 3 of layer 1"):
        rig.transfer.await_slot(0)
    rig.assert_nothing_is_under_way()


def assert_condemned(store, layer, expert):
    with pytest.raises(
        DamagedStore, match=f"expert {expert} of layer {layer}: its checksum is"
    ):
        open_store(store.directory, store.identity)


@reading_files
@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("offset", [0, 8192 + 17, MIXED.record_bytes - 1])
def test_a_record_is_checked_when_it_is_first_read(own_store, rig_over, verify, offset):
    rig = rig_over(own_store, verify=verify)
    flip(own_store, 1, 1, offset)
    rig.transfer.read([(1, 0, 0)])
    assert open_store(own_store.directory, own_store.identity) == own_store
    for _ in range(2):  # one that failed is not taken for checked
        with pytest.raises(TransferError, match=r"expert 1 of layer 1.*its checksum is"):
            rig.transfer.read([(1, 1, 1), (1, 2, 2)])
    assert_condemned(own_store, 1, 1)
    rig.assert_kernels_find((1, 0, 0))
    rig.assert_nothing_is_under_way()


@reading_files
def test_a_record_read_again_is_checked_only_with_verify(tmp_path, rig_over):
    outcomes = []
    for verify in (False, True):
        store = build(tmp_path / str(verify), num_layers=2, num_experts=8)
        rig = rig_over(store, verify=verify)
        rig.transfer.read([(1, 1, 0)])
        flip(store, 1, 1)
        for expert in range(8):  # host memory has fewer slots and forgets it
            rig.transfer.read([(0, expert, 1)])
        try:
            rig.transfer.read([(1, 1, 0)])
        except TransferError as error:
            outcomes.append(str(error))
        else:
            outcomes.append(None)
    unchecked, checked = outcomes
    assert unchecked is None
    assert "its checksum is" in checked
    assert_condemned(store, 1, 1)


@reading_files
def test_a_prefetched_record_is_checked_when_it_is_first_read(own_store, rig_over):
    rig = rig_over(own_store)
    flip(own_store, 1, 1)
    assert rig.transfer.prefetch([(1, 1, 0), (1, 2, 1)]) == 2
    bad, good = sorted(wait_for_prefetches(rig.transfer, 2), key=lambda flight: flight.expert)
    assert bad.state is State.FAILED
    assert "expert 1 of layer 1" in bad.error
    assert "its checksum is" in bad.error
    assert_condemned(own_store, 1, 1)
    assert good.state is State.LANDED
    rig.assert_kernels_find((1, 2, 1))
    rig.transfer.prefetch([(1, 1, 0)])
    with pytest.raises(TransferError, match="expert 1 of layer 1"):
        rig.transfer.await_slot(0)
    rig.assert_nothing_is_under_way()


@reading_files
def test_a_prefetch_dropped_too_late_is_checked_as_well(own_store, rig_over):
    rig = rig_over(own_store)
    flip(own_store, 1, 1)
    rig.transfer.prefetch([(1, 1, 0)])
    while not rig.files.has_news:
        time.sleep(0.0001)
    assert not rig.transfer.drop(0)
    (ended,) = wait_for_prefetches(rig.transfer, 1)
    assert ended.state is State.DROPPED
    assert_condemned(own_store, 1, 1)


@reading_files
def test_of_joined_stores_the_damaged_one_is_condemned(tmp_path, rig_over):
    both = build_joined(tmp_path, MIXED, (2, 1), 4)
    first, second = both.joins
    flip(both, 2, 3)
    rig = rig_over(both)
    rig.transfer.read([(1, 3, 0)])
    with pytest.raises(TransferError, match=rf"expert 3 of layer 0 from {second.path}"):
        rig.transfer.read([(2, 3, 1)])
    assert open_store(first.directory, first.identity) == first
    assert_condemned(second, 0, 3)


# ---- end -----------------------------------------------------------------------------------


@reading_files
@pytest.mark.parametrize("name", ["read", "await_slot", "drain"])
def test_a_signal_leaves_nothing_under_way(store, rig_over, monkeypatch, name):
    """As Ctrl-C in the middle of a wait for the file."""
    rig = rig_over(store)
    rig.transfer.prefetch([(0, 0, 0), (0, 1, 1)])
    interruptions = [1]
    collect = rig.files._collect

    def interrupted(*arguments):
        ended = collect(*arguments)
        if interruptions:
            interruptions.pop()
            raise Interrupted
        return ended

    monkeypatch.setattr(rig.files, "_collect", interrupted)
    requests = [(1, e, e + 2) for e in range(4)]
    call, arguments = {
        "read": (rig.transfer.read, [requests]),
        "await_slot": (rig.transfer.await_slot, [1]),
        "drain": (rig.transfer.drain, []),
    }[name]
    with pytest.raises(Interrupted):
        call(*arguments)
    rig.transfer.drain()
    assert sorted(flight.slot for flight in rig.transfer.poll()) == [0, 1]
    rig.assert_nothing_is_under_way()
    rig.transfer.read(requests)
    rig.assert_kernels_find(*requests)


def test_close_ends_everything_and_later_calls_are_errors(big_store, rig_over):
    rig = rig_over(big_store, num_threads=3)
    rig.transfer.read([(0, 7, 7)])
    rig.transfer.prefetch([(0, expert, expert) for expert in range(3)])
    rig.transfer.close()
    rig.transfer.close()
    with pytest.raises(ValueError, match="closed"):
        rig.transfer.begin_read([(0, 0, 0)])
    with pytest.raises(ValueError, match="closed"):
        rig.transfer.prefetch([(0, 0, 0)])
    with pytest.raises(ValueError, match="not in flight"):
        rig.transfer.drop(0)
    assert not rig.transfer.poll()
    rig.transfer.drain()
