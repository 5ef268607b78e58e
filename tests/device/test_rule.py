"""The rule of the device's cache, against the same rule told slot by slot and expert by expert."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from vllm_moe_offload.device.rule import A_CYCLE, OnePool, fade_of, fixed_point, gains


@dataclass
class Call:
    """What one layer call asks for: ``ids`` per token, votes in fixed point."""

    layer: int
    ids: list[list[int]]
    weights: list[int]


class Told:
    """Dictionaries and loops; float32 where the rule has float32."""

    def __init__(self, num_layers: int, num_experts: int, num_slots: int) -> None:
        self.shape = num_layers, num_experts
        self.in_slot: dict[int, tuple[int, int] | None] = dict.fromkeys(range(num_slots))
        self.score: dict[tuple[int, int], np.float32] = {}
        self.hits = self.misses = 0
        self.fade = np.float32(0.5 ** (1 / 8))

    def slot_of(self, expert: tuple[int, int]) -> int | None:
        return next((slot for slot, owner in self.in_slot.items() if owner == expert), None)

    def worth(self, slot: int, layer: int) -> np.float32:
        owner = self.in_slot[slot]
        if owner is None:
            return np.float32(-math.inf)
        near = np.float32(math.exp(-0.5) if owner[0] <= layer else 1)
        return self.score.get(owner, np.float32(0)) * near

    def call(self, call: Call) -> Iterator[dict[int, int]]:
        """Slots of the experts of every wave."""
        votes: dict[int, int] = {}
        for chosen, weight in zip(call.ids, call.weights, strict=True):
            for expert in chosen:
                if expert >= 0:
                    votes[expert] = votes.get(expert, 0) + weight
        for expert in range(self.shape[1]):
            old = self.score.get((call.layer, expert), np.float32(0))
            gain = np.float32(math.exp(-0.5 * call.layer / self.shape[0]) / 2**30)
            share = np.float32(votes.get(expert, 0)) * gain
            self.score[call.layer, expert] = old * self.fade + share
        wanted = sorted(votes)
        resident = [e for e in wanted if self.slot_of((call.layer, e)) is not None]
        self.hits += len(resident)
        self.misses += len(wanted) - len(resident)
        while True:
            wave = {e: self.slot_of((call.layer, e)) for e in wanted}
            pinned = {slot for slot in wave.values() if slot is not None}
            for expert in wanted:
                free = [slot for slot in self.in_slot if slot not in pinned]
                if wave[expert] is not None or not free:
                    continue
                victim = min(free, key=lambda slot: (self.worth(slot, call.layer), slot))
                self.in_slot[victim] = call.layer, expert
                wave[expert] = victim
                pinned.add(victim)
            yield {e: slot for e, slot in wave.items() if slot is not None}
            wanted = [e for e in wanted if wave[e] is None]
            if not wanted:
                return


def calls(rng: np.random.Generator, num_layers: int, num_experts: int) -> Iterator[Call]:
    """A few steps of a few tokens; some of their ids are other ranks'."""
    top_k = int(rng.integers(1, min(num_experts, 4) + 1))
    for _ in range(int(rng.integers(1, 5))):
        num_tokens = int(rng.integers(1, 7))
        weights = rng.integers(0, 2**30 // num_tokens, num_tokens)
        for layer in range(num_layers):
            ids = np.stack([rng.permutation(num_experts)[:top_k] for _ in range(num_tokens)])
            ids[rng.random(ids.shape) < 0.1] = -1
            yield Call(layer, ids.tolist(), weights.tolist())


@pytest.mark.parametrize("block", range(10))
def test_ten_thousand_sequences(block: int) -> None:
    for seed in range(1000 * block, 1000 * (block + 1)):
        rng = np.random.default_rng(seed)
        num_layers, num_experts = int(rng.integers(1, 4)), int(rng.integers(1, 9))
        num_slots = int(rng.integers(1, num_layers * num_experts + 1))
        told = Told(num_layers, num_experts, num_slots)
        pool = OnePool(num_layers, num_experts, num_slots)
        for call in calls(rng, num_layers, num_experts):
            pool.observe(call.layer, np.array(call.ids), np.array(call.weights, np.int32))
            for expected in told.call(call):
                check_wave(pool, call.layer, expected)
            assert pool.is_served, seed
            assert (pool.hits, pool.misses) == (told.hits, told.misses), seed
            check_state(pool, told)


def check_wave(pool: OnePool, layer: int, expected: dict[int, int]) -> None:
    before = pool.slot_of[layer].copy()
    wave = pool.place(layer)
    assert {e: int(wave.call_map[e]) for e in np.flatnonzero(wave.in_wave)} == expected
    stand_in = min(expected.values(), default=0)
    assert (wave.call_map[~wave.in_wave] == stand_in).all()
    missed = {e: slot for e, slot in expected.items() if before[e] < 0}
    first = layer * pool.num_experts
    assert {int(record) - first: int(slot) for record, slot in wave.pairs} == missed


def check_state(pool: OnePool, told: Told) -> None:
    for slot, owner in told.in_slot.items():
        known = -1 if owner is None else owner[0] * pool.num_experts + owner[1]
        assert pool.owner[slot] == known
        assert owner is None or pool.slot_of[owner] == slot
    assert np.count_nonzero(pool.slot_of >= 0) == np.count_nonzero(pool.owner >= 0)
    for expert, score in told.score.items():
        assert pool.score[expert] == score


def test_votes_of_a_large_prompt_do_not_vanish() -> None:
    """Rounded down, and still of three digits."""
    votes = fixed_point(np.full(2**20, 1 / 2**20 / 8, np.float32))
    assert votes.min() >= 100
    assert votes.sum(dtype=np.int64) <= 2**30


def test_ids_that_are_no_expert_need_nothing() -> None:
    pool = OnePool(1, 4, 4)
    pool.observe(0, np.array([[-1, 2], [4, 900]]), np.array([2**29, 2**29], np.int32))
    assert np.flatnonzero(pool.need).tolist() == [2]
    assert pool.score[0].tolist() == [0, 0, 0.5, 0]


def test_votes_wrap_around_where_a_token_repeats_an_id() -> None:
    """As in the kernels, whose votes have 32 bits; what is needed is not changed by it."""
    pool = OnePool(1, 2, 2)
    pool.observe(0, np.array([[1, 1, 1]]), np.array([2**30], np.int32))
    assert pool.need.tolist() == [False, True]
    assert pool.score[0].tolist() == [0, -1]


def test_what_comes_soon_is_worth_more() -> None:
    """Two experts of one score: that of the layer just served leaves."""
    pool = OnePool(3, 4, 4)
    one = np.array([2**30], np.int32)
    for layer in (0, 1):
        pool.observe(layer, np.array([[0, 1]]), one)
        pool.place(layer)
    pool.observe(2, np.array([[3]]), one)
    pool.place(2)
    assert (pool.slot_of[0, :2] >= 0).all(), "layer 0 is the next to come"
    assert np.count_nonzero(pool.slot_of[1] >= 0) == 1


def test_worth_falls_with_the_layers_between() -> None:
    """At every layer of a cycle, whatever share of it is in the scores."""
    num_layers = 48
    gain = gains(num_layers)
    for layer in range(num_layers):
        worth = np.where(np.arange(num_layers) <= layer, A_CYCLE, 1) * gain
        between = (np.arange(num_layers) - layer - 1) % num_layers
        expected = np.exp(-0.5 * between / num_layers)
        np.testing.assert_allclose(worth / worth[between == 0], expected, rtol=1e-6)


def test_replay_needs_neither_torch_nor_triton() -> None:
    program = (
        "import sys; sys.modules['torch'] = sys.modules['triton'] = None;"
        "import vllm_moe_offload.device.rule, vllm_moe_offload.replay.one_pool"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("half_life", [0, -1, math.nan])
def test_half_life_is_positive(half_life: float) -> None:
    with pytest.raises(ValueError, match=r"half_life must be a positive number of steps"):
        fade_of(half_life)


def test_a_pool_has_slots() -> None:
    with pytest.raises(ValueError, match="num_slots must be at least 1, got 0"):
        OnePool(2, 4, 0)
