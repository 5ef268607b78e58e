"""The kernels, interpreted on a CPU, do what the rule says to the bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tests.device.kernels.harness import MORE_TENSORS, Comparison, Shape
from vllm_moe_offload.device import cache
from vllm_moe_offload.device.tokens import LayerTokens

FEW, MANY = 3, 30
"""Tokens: needs that the planner finds by itself, and those that are counted before."""


@pytest.mark.parametrize("num_ranks", [1, 2], ids=["alone", "one of two ranks"])
@pytest.mark.parametrize("padding", ["experts", "-1"])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("max_tokens", [FEW, MANY])
@pytest.mark.parametrize("num_slots", [18, 9, 6, 4, 1])
def test_every_kind_of_call(num_slots, max_tokens, dtype, padding, num_ranks) -> None:
    shape = Shape(3, 6, 2, num_slots, max_tokens, padding, num_ranks, dtype)
    Comparison(cache, shape).run(seed=num_slots, num_steps=3)


@pytest.mark.parametrize("is_counted", [False, True], ids=["few tokens", "many"])
@pytest.mark.parametrize("num_experts", [8, 60, 128, 384, 1024])
def test_any_number_of_experts(num_experts: int, is_counted: bool) -> None:
    max_tokens = num_experts if is_counted else 4
    shape = Shape(2, num_experts, 4, num_experts + 3, max_tokens)
    Comparison(cache, shape).run(seed=num_experts, num_steps=2)


@pytest.mark.parametrize(("top_k", "num_slots"), itertools.product([1, 3, 9], [9, 20]))
def test_long_sequences(top_k: int, num_slots: int) -> None:
    """The last of ``top_k``: each token chooses every expert."""
    Comparison(cache, Shape(2, 9, top_k, num_slots, 4)).run(seed=top_k, num_steps=15)


@pytest.mark.parametrize("max_tokens", [FEW, MANY])
@pytest.mark.parametrize("num_slots", [12, 5])
def test_ids_that_repeat_or_are_no_expert(max_tokens: int, num_slots: int) -> None:
    """Votes that wrap around included."""
    shape = Shape(2, 8, 4, num_slots, max_tokens, kind="any")
    Comparison(cache, shape).run(seed=max_tokens, num_steps=8)


def test_any_number_of_tensors() -> None:
    Comparison(cache, Shape(2, 6, 2, 7, 3), MORE_TENSORS).run(seed=0, num_steps=5)


@pytest.mark.parametrize("num_tokens", [FEW, MANY])
def test_calls_are_noted_and_nothing_else(num_tokens: int) -> None:
    """Where all experts are resident and somebody records."""
    compared = Comparison(cache, Shape(2, 6, 2, 1, MANY))
    noted = compared.cache
    ids = torch.arange(num_tokens * 2, dtype=torch.int32).view(num_tokens, 2) % 6
    is_padding = torch.arange(num_tokens) >= num_tokens - 1
    tokens = LayerTokens(ids, is_padding, torch.zeros(num_tokens, dtype=torch.int32))
    noted.note(1, tokens)
    assert not (noted.log >= 0).any(), "not live"
    noted.live.fill_(1)
    noted.note(1, tokens)
    assert noted.log[: num_tokens - 1, 1].tolist() == ids[:-1].tolist()
    assert not (noted.log[num_tokens - 1 :] >= 0).any()
    assert not (noted.log[:, 0] >= 0).any()
    assert noted.counters.tolist() == [0, 0]


@pytest.mark.parametrize("num_slots", [18, 6, 4])
def test_warm_up_leaves_nothing_behind(num_slots: int) -> None:
    compared = Comparison(cache, Shape(3, 6, 2, num_slots, MANY))
    compared.cache.warm_up(torch.int32)
    compared.run(seed=1, num_steps=2)
