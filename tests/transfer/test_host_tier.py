"""Host memory for experts: filled from the file, bytes as they lie there, rows held in use."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.stores import MIXED, build, layer_tensors, layout_of
from vllm_moe_offload.transfer import HostTier, TransferError
from vllm_moe_offload.transfer.host_rows import HostRows


@pytest.fixture
def store(tmp_path):
    return build(tmp_path, num_layers=3, num_experts=20)


@pytest.fixture
def tier_of(request):
    def make(store, num_rows, **options):
        tier = HostTier(store, num_rows, **options)
        request.addfinalizer(tier.close)
        return tier

    return make


def assert_record(tier, row, layer, expert):
    record = tier.arena[row]
    tensors = layer_tensors(tier.store.layout, tier.store.num_experts, layer)
    begin = 0
    layout = tier.store.layout
    for spec in (*layout.direct, *layout.tail):
        assert (record[begin : begin + spec.nbytes] == tensors[spec.name][expert]).all()
        begin += spec.nbytes


@pytest.mark.parametrize("num_rows", [60, 1000])
def test_everything_lies_in_store_order(store, tier_of, num_rows):
    seen = []
    tier = tier_of(store, num_rows, verify=True)
    assert tier.holds_everything
    tier.fill(lambda count, total: seen.append((count, total)))
    assert tier.arena.tobytes() == store.path.read_bytes()
    assert seen[-1] == (60, 60)
    assert [count for count, _ in seen] == sorted({count for count, _ in seen})
    for layer in range(3):
        for expert in range(20):
            assert tier.rows.find(layer, expert) == layer * 20 + expert


def test_memory_is_what_was_asked_for(store, tier_of):
    tier = tier_of(store, 7)
    assert tier.nbytes == 7 * MIXED.record_bytes
    assert tier.arena.ctypes.data % 4096 == 0


def test_a_part_is_filled_with_as_many_of_each_layer(store, tier_of):
    tier = tier_of(store, 31)
    assert not tier.holds_everything
    tier.fill()
    found = {}
    for layer in range(3):
        for expert in range(20):
            row = tier.rows.find(layer, expert)
            if row is not None:
                found[layer, expert] = row
                assert_record(tier, row, layer, expert)
    assert [sum(layer == key[0] for key in found) for layer in range(3)] == [11, 10, 10]
    assert len(set(found.values())) == 31


def test_too_small(store):
    with pytest.raises(ValueError, match="host tier of 1 rows is too small, it needs 2"):
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
    content = bytearray(store.path.read_bytes())
    content[store.record_offset(2, 3) + 5000] ^= 1
    store.path.write_bytes(content)
    tier = tier_of(store, 60, verify=True)
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


class RowsMachine(RuleBasedStateMachine):
    """HostRows against plain dictionaries."""

    NUM_ROWS = 4

    def __init__(self):
        super().__init__()
        self.rows = HostRows(self.NUM_ROWS)
        self.holds: dict[int, int] = {}
        self.content: dict[int, tuple[int, int]] = {}
        self.coming: dict[int, tuple[int, int]] = {}
        self.used: list[tuple[int, int]] = []  # oldest use first

    experts = st.tuples(st.integers(0, 1), st.integers(0, 3))

    @rule(expert=experts)
    def find(self, expert):
        row = self.rows.find(*expert)
        if expert in self.content.values():
            assert self.content[row] == expert
            self.holds[row] += 1
            self.used.remove(expert)
            self.used.append(expert)
        else:
            assert row is None

    @rule(expert=experts)
    def reserve(self, expert):
        if expert in self.content.values() or expert in self.coming.values():
            return
        row = self.rows.reserve(*expert)
        taken = self.content.keys() | self.coming.keys()
        if len(taken) < self.NUM_ROWS:
            assert row not in taken
        else:
            by_expert = {e: r for r, e in self.content.items()}
            free = [e for e in self.used if not self.holds[by_expert[e]]]
            if not free:
                assert row is None
                return
            assert row == by_expert[free[0]]
            del self.content[row]
            self.used.remove(free[0])
        self.coming[row] = expert
        self.holds[row] = 1

    @precondition(lambda self: self.coming)
    @rule(data=st.data(), ok=st.booleans())
    def end(self, data, ok):
        row = data.draw(st.sampled_from(sorted(self.coming)))
        expert = self.coming.pop(row)
        if ok:
            self.rows.arrived(row)
            self.content[row] = expert
            self.used.append(expert)
        else:
            self.rows.abandon(row)
            self.holds[row] = 0

    @rule(data=st.data())
    def release(self, data):
        held = [row for row in self.content if self.holds[row]]
        if held:
            row = data.draw(st.sampled_from(held))
            self.rows.release(row)
            self.holds[row] -= 1

    @invariant()
    def held_rows(self):
        assert self.rows.num_held == sum(holds > 0 for holds in self.holds.values())


RowsMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None
)
TestRows = RowsMachine.TestCase
