"""Integers of a few bits: rounding, and where their bits lie."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.quantize.awq import ORDER
from scripts.quantize.integers import asymmetric, packed, symmetric
from tests.examples import examples
from tests.scripts.quantize.reference import AWQ_PLACES

TABLES = st.tuples(st.integers(1, 5), st.integers(1, 4), st.randoms(use_true_random=False)).map(
    lambda sizes: [
        [sizes[2].randrange(16) for _ in range(8 * sizes[1])] for _ in range(sizes[0])
    ]
)


def slowly_packed(rows: list[list[int]], places: tuple[int, ...]) -> list[list[int]]:
    """Each row's words, as unsigned numbers: value ``i`` of eight at place ``places[i]``."""
    words = []
    for row in rows:
        words.append([])
        for start in range(0, len(row), 8):
            word = 0
            for value, place in zip(row[start : start + 8], places, strict=True):
                word += value * 16**place
            words[-1].append(word)
    return words


def unsigned(words: torch.Tensor) -> list[list[int]]:
    assert words.dtype == torch.int32
    return [[word % 2**32 for word in row] for row in words.tolist()]


@settings(max_examples=examples(60), deadline=None)
@given(TABLES)
def test_eight_values_lie_in_a_word(rows: list[list[int]]) -> None:
    plain = slowly_packed(rows, tuple(range(8)))
    table = torch.tensor(rows)
    assert unsigned(packed(table, dim=1)) == plain
    assert unsigned(packed(table.T, dim=0).T) == plain
    assert unsigned(packed(table, dim=1, order=ORDER)) == slowly_packed(rows, AWQ_PLACES)


def test_words_of_known_values() -> None:
    row = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 15]])
    assert unsigned(packed(row, dim=1)) == [[0xF6543210]]
    assert unsigned(packed(row, dim=1, order=ORDER)) == [[0xF5316420]]


GROUPS = st.tuples(
    st.integers(0, 2**31), st.integers(1, 6), st.sampled_from((8, 32)), st.floats(-6, 3)
)


def drawn(choice: tuple[int, int, int, float]) -> torch.Tensor:
    """Random groups, one of them zeros and one of them positive."""
    seed, rows, size, exponent = choice
    rng = torch.Generator().manual_seed(seed)
    groups = torch.empty(rows, 3, size).normal_(std=10**exponent, generator=rng)
    groups[0, 0] = 0
    groups[0, 1] = groups[0, 1].abs()
    return groups


@settings(max_examples=examples(60), deadline=None)
@given(GROUPS, st.sampled_from((4, 8)))
def test_symmetric_is_within_half_a_step(
    choice: tuple[int, int, int, float], bits: int
) -> None:
    groups = drawn(choice)
    values, scale = symmetric(groups, bits, torch.float32)
    assert int(values.min()) >= -(2 ** (bits - 1))
    assert int(values.max()) < 2 ** (bits - 1)
    step = scale[..., None]
    assert bool(((values * step - groups).abs() <= 0.5001 * step).all())
    # The range is used: the largest value is one of the two outermost.
    largest = values.abs().amax(dim=-1)[groups.abs().amax(dim=-1) > 0]
    assert int(largest.min()) >= 2 ** (bits - 1) - 1


@settings(max_examples=examples(60), deadline=None)
@given(GROUPS)
def test_asymmetric_is_within_half_a_step(choice: tuple[int, int, int, float]) -> None:
    groups = drawn(choice)
    values, zero, scale = asymmetric(groups, 4, torch.float32)
    for integers in (values, zero):
        assert int(integers.min()) >= 0
        assert int(integers.max()) <= 15
    step = scale[..., None]
    assert bool((((values - zero[..., None]) * step - groups).abs() <= 0.5001 * step).all())


def test_values_follow_the_scale_that_is_stored() -> None:
    """A scale is rounded to bfloat16 first, and values are multiples of what it is then."""
    groups = torch.full((1, 1, 8), 1.0)
    groups[..., 1:] = torch.linspace(-0.9, 0.9, 7)
    values, scale = symmetric(groups, 4, torch.bfloat16)
    assert scale.dtype == torch.bfloat16
    step = scale.float()[..., None]
    inside = groups < 7 * step
    assert bool(((values * step - groups).abs() <= 0.5001 * step)[inside].all())
