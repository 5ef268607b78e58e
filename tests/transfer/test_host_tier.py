"""Host memory for experts: filled from the file, bytes as they lie there, slots held in use."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.stores import MIXED, build, flip, layer_tensors, layout_of
from vllm_moe_offload.transfer import HostTier, TransferError
from vllm_moe_offload.transfer.host_slots import HostSlots


@pytest.fixture
def store(tmp_path):
    return build(tmp_path, num_layers=3, num_experts=20)


@pytest.fixture
def tier_of(request):
    def make(store, num_slots, **options):
        tier = HostTier(store, num_slots, **options)
        request.addfinalizer(tier.close)
        return tier

    return make


def assert_record(tier, slot, layer, expert):
    record = tier.arena[slot]
    tensors = layer_tensors(tier.store.layout, tier.store.num_experts, layer)
    begin = 0
    layout = tier.store.layout
    for spec in (*layout.direct, *layout.tail):
        assert (record[begin : begin + spec.nbytes] == tensors[spec.name][expert]).all()
        begin += spec.nbytes


@pytest.mark.parametrize("num_slots", [60, 1000])
def test_everything_lies_in_store_order(store, tier_of, num_slots):
    seen = []
    tier = tier_of(store, num_slots, verify=True)
    assert tier.holds_everything
    tier.fill(lambda count, total: seen.append((count, total)))
    assert tier.arena.tobytes() == store.path.read_bytes()
    assert seen[-1] == (60, 60)
    assert [count for count, _ in seen] == sorted({count for count, _ in seen})
    for layer in range(3):
        for expert in range(20):
            assert tier.slots.find(layer, expert) == layer * 20 + expert


def test_memory_is_what_was_asked_for(store, tier_of):
    tier = tier_of(store, 7)
    assert tier.arena.nbytes == 7 * MIXED.record_bytes
    assert tier.arena.ctypes.data % 4096 == 0


def test_a_part_is_filled_with_as_many_of_each_layer(store, tier_of):
    tier = tier_of(store, 31)
    assert not tier.holds_everything
    tier.fill()
    found = {}
    for layer in range(3):
        for expert in range(20):
            slot = tier.slots.find(layer, expert)
            if slot is not None:
                found[layer, expert] = slot
                assert_record(tier, slot, layer, expert)
    assert [sum(layer == key[0] for key in found) for layer in range(3)] == [11, 10, 10]
    assert len(set(found.values())) == 31


def test_too_small(store):
    with pytest.raises(ValueError, match="host tier of 1 slots is too small, it needs 2"):
        HostTier(store, 1)


def test_impossible_size_is_a_memory_error(store, monkeypatch):
    def refuse(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(MemoryError, match=r"host memory for 60 experts.*lower host_gb"):
        HostTier(store, 60)


def test_children_do_not_share_the_memory(store, tier_of):
    tier = tier_of(store, 7)
    begin = tier.arena.ctypes.data
    flags = set()
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            inside = low <= begin < high
        elif inside and first == "VmFlags:":
            flags = set(line.split()[1:])
    assert "dc" in flags  # not copied by fork


def test_damage_is_found_while_filling(store, tier_of):
    flip(store, 2, 3, 5000)
    tier = tier_of(store, 60)
    with pytest.raises(TransferError, match=r"expert 3 of layer 2.*checksum"):
        tier.fill()


def test_records_of_only_a_tail(tmp_path, tier_of):
    store = build(tmp_path, layout_of(100, 7), num_layers=1, num_experts=3)
    tier = tier_of(store, 3)
    tier.fill()
    for expert in range(3):
        assert_record(tier, expert, 0, expert)


def test_a_file_that_ends_early_names_the_expert(store, tier_of):
    tier = tier_of(store, 60)
    os.truncate(store.path, store.record_offset(1, 7))
    with pytest.raises(TransferError, match="expert 7 of layer 1"):
        tier.fill()


class SlotsMachine(RuleBasedStateMachine):
    """HostSlots against plain dictionaries."""

    NUM_SLOTS = 4

    def __init__(self):
        super().__init__()
        self.slots = HostSlots(self.NUM_SLOTS)
        self.holds: dict[int, int] = {}
        self.content: dict[int, tuple[int, int]] = {}
        self.coming: dict[int, tuple[int, int]] = {}
        self.used: list[tuple[int, int]] = []  # oldest use first

    experts = st.tuples(st.integers(0, 1), st.integers(0, 3))

    @rule(expert=experts)
    def find(self, expert):
        slot = self.slots.find(*expert)
        if expert in self.content.values():
            assert self.content[slot] == expert
            self.holds[slot] += 1
            self.used.remove(expert)
            self.used.append(expert)
        else:
            assert slot is None

    @rule(expert=experts)
    def reserve(self, expert):
        if expert in self.content.values() or expert in self.coming.values():
            return
        slot = self.slots.reserve(*expert)
        taken = self.content.keys() | self.coming.keys()
        if len(taken) < self.NUM_SLOTS:
            assert slot not in taken
        else:
            by_expert = {e: r for r, e in self.content.items()}
            free = [e for e in self.used if not self.holds[by_expert[e]]]
            if not free:
                assert slot is None
                return
            assert slot == by_expert[free[0]]
            del self.content[slot]
            self.used.remove(free[0])
        self.coming[slot] = expert
        self.holds[slot] = 1

    @precondition(lambda self: self.coming)
    @rule(data=st.data(), ok=st.booleans())
    def end(self, data, ok):
        slot = data.draw(st.sampled_from(sorted(self.coming)))
        expert = self.coming.pop(slot)
        if ok:
            self.slots.arrived(slot)
            self.content[slot] = expert
            self.used.append(expert)
        else:
            self.slots.abandon(slot)
            self.holds[slot] = 0

    @rule(data=st.data())
    def release(self, data):
        held = [slot for slot in self.content if self.holds[slot]]
        if held:
            slot = data.draw(st.sampled_from(held))
            self.slots.release(slot)
            self.holds[slot] -= 1

    @invariant()
    def held_slots(self):
        assert self.slots.num_held == sum(holds > 0 for holds in self.holds.values())


SlotsMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None
)
TestSlots = SlotsMachine.TestCase
