"""Averages kept by scale, against averages that fade as a whole."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_moe_offload.forecast import averages
from vllm_moe_offload.forecast.averages import FadingTables, StepUses, UseAverages
from vllm_moe_offload.policy.trace import TracePolicy
from vllm_moe_offload.step import StepTokens

LAYERS, EXPERTS, TOP_K = 2, 8, 2
SIZE = LAYERS * EXPERTS
HALF_LIVES = (1.0, 5.0)


def some_step(
    generator: np.random.Generator, requests: list[int], lengths: list[int]
) -> StepUses:
    rows = StepTokens.of_lengths(
        [str(request) for request in requests],
        np.array(lengths),
        np.zeros(len(lengths), np.int64),
        np.zeros(len(lengths), np.bool_),
    )
    shuffled = np.argsort(generator.random((LAYERS, sum(lengths), EXPERTS)), axis=2)
    ids = shuffled[:, :, :TOP_K].astype(np.int32)
    return StepUses.of_step(ids, rows, np.array(requests), EXPERTS)


def test_ids_of_no_expert_are_no_uses() -> None:
    one = np.ones(2, np.int64)
    rows = StepTokens.of_lengths(["a", "b"], one, 0 * one, one < 0)
    ids = np.array([[[1, -1], [-1, -1]], [[-1, 0], [7, 2]]], np.int32)
    uses = StepUses.of_step(ids, rows, np.array([4, 6]), EXPERTS)
    assert uses.keys.tolist() == [1, EXPERTS, EXPERTS + 7, EXPERTS + 2]
    assert uses.owner.tolist() == [4, 4, 6, 6]
    assert uses.age.tolist() == [0] * 4


@pytest.mark.parametrize("longest", [1, 9, 3000])
def test_averages_are_those_of_fading_tables(longest: int) -> None:
    generator = np.random.default_rng(longest)
    averages = UseAverages(HALF_LIVES, np.zeros((2, SIZE), np.float32))
    decay = 2.0 ** (-1.0 / np.array(HALF_LIVES))
    plain = np.zeros((2, 0, SIZE))
    weight = np.zeros((2, 0))
    for step in range(150):
        running = plain.shape[1]
        if (running < 12 and generator.random() < 0.2) or not running:
            averages.add(running)
            plain = np.concatenate([plain, np.zeros((2, 1, SIZE))], axis=1)
            weight = np.concatenate([weight, np.zeros((2, 1))], axis=1)
            running += 1
        if running > 1 and generator.random() < 0.1:
            row = int(generator.integers(running))
            averages.move(running - 1, row)
            plain[:, row], weight[:, row] = plain[:, -1], weight[:, -1]
            plain, weight = plain[:, :-1], weight[:, :-1]
            running -= 1
        everyone = step % 3 != 0
        chosen = [row for row in range(running) if everyone or generator.random() < 0.7] or [0]
        lengths = generator.integers(1, longest + 1, len(chosen)).tolist()
        uses = some_step(generator, chosen, lengths)
        averages.take_in(uses, running)
        for index in range(2):
            for row, length in zip(chosen, lengths, strict=True):
                plain[index, row] *= decay[index] ** length
                mine = uses.owner == row
                gain = (1 - decay[index]) * decay[index] ** uses.age[mine].astype(float)
                np.add.at(plain[index, row], uses.keys[mine], gain)
                kept = (1 - weight[index, row]) * decay[index] ** length
                weight[index, row] = 1 - kept
        averages.refresh_totals(running)
        np.testing.assert_allclose(
            averages.totals.values, plain.sum(axis=1), rtol=1e-4, atol=1e-6
        )
        np.testing.assert_allclose(averages.weight[:, :running], weight, rtol=1e-6)


def test_an_expert_of_every_token_reaches_the_weight() -> None:
    averages = UseAverages(HALF_LIVES, np.zeros((2, SIZE), np.float32))
    averages.add(0)
    rows = StepTokens.of_lengths(["a"], np.array([1]), np.array([0]), np.array([False]))
    ids = np.broadcast_to(np.array([3, 4], np.int32), (LAYERS, 1, TOP_K))
    for _ in range(300):
        averages.take_in(StepUses.of_step(ids, rows, np.array([0]), EXPERTS), 1)
        totals = averages.totals.values
        np.testing.assert_allclose(totals[:, 3], averages.weight[:, 0], rtol=1e-4)
    assert totals[:, 3] == pytest.approx([1, 1], rel=1e-3)


def test_fading_tables_hold_what_plain_tables_would() -> None:
    generator = np.random.default_rng(0)
    tables = FadingTables(np.zeros((3, SIZE), np.float32))
    plain = np.zeros((3, SIZE))
    keep = np.array([0.5, 0.97, 1.0])
    for _ in range(200):
        keys = generator.integers(0, SIZE, 7)  # some of them twice
        gain = generator.random((3, 1))
        tables.fade(keep)
        tables.add(keys, gain)
        plain *= keep[:, None]
        np.add.at(plain, (slice(None), keys), gain)
        np.testing.assert_allclose(tables.values, plain, rtol=1e-4, atol=1e-6)
    assert (tables.scale > 1e-9).all()


def test_scores_do_not_depend_on_when_tables_are_multiplied_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def scores_of_a_run() -> np.ndarray:
        generator = np.random.default_rng(5)
        policy = TracePolicy(LAYERS, EXPERTS)
        for step in range(60):
            tokens = StepTokens.of_lengths(
                ["a", "b"], np.ones(2, int), np.full(2, step), np.zeros(2, np.bool_)
            )
            policy.begin_step(tokens)
            policy.catch_up()
            taste = 0.2 * np.roll(np.arange(EXPERTS), step // 10)  # changes now and then
            order = np.argsort(generator.random((LAYERS, 2, EXPERTS)) + taste, axis=2)
            for layer, ids in enumerate(order[:, :, :TOP_K].astype(np.int32)):
                votes = np.bincount(ids.reshape(-1), minlength=EXPERTS) / 2
                policy.observe(layer, ids, votes.astype(np.float32))
            policy.end_step()
        return policy.scores

    late = scores_of_a_run()
    monkeypatch.setattr(averages, "SMALLEST_TABLE_SCALE", 2.0)  # at every step
    np.testing.assert_allclose(late, scores_of_a_run(), rtol=1e-3, atol=1e-5)


def test_rounds_are_steps_of_one_token_and_prompts_go_at_once() -> None:
    generator = np.random.default_rng(3)
    uses = some_step(generator, [4, 1, 6], [3, 5, 1])
    rounds = list(uses.rounds(np.array([False, True, False])))
    assert [part.indices.tolist() for part in rounds] == [[4], [4], [4, 1, 6]]
    assert [part.lengths.tolist() for part in rounds] == [[1], [1], [1, 5, 1]]
    for later, part in zip((2, 1, 0), rounds, strict=True):
        of_drafted = (uses.owner == 4) & (uses.age == later)
        assert part.keys[part.owner == 4].tolist() == uses.keys[of_drafted].tolist()
        assert (part.age[part.owner != 1] == 0).all()
    of_prompt, wanted = rounds[-1].owner == 1, uses.owner == 1
    assert rounds[-1].keys[of_prompt].tolist() == uses.keys[wanted].tolist()
    assert rounds[-1].age[of_prompt].tolist() == uses.age[wanted].tolist()
    assert sum(part.keys.size for part in rounds) == uses.keys.size


def test_steps_of_one_token_are_one_round() -> None:
    uses = some_step(np.random.default_rng(3), [4, 1], [1, 7])
    assert list(uses.rounds(np.array([False, True]))) == [uses]
