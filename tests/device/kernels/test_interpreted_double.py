"""The cache that engines on a CPU plan with is the kernels', call by call."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.device.kernels.harness import LAYOUT, Comparison, Shape, random_steps
from tests.device.rule_cache import RuleCache
from vllm_moe_offload.device import cache
from vllm_moe_offload.device.tokens import LayerTokens

FEW, MANY = 3, 30


class Both:
    """The kernels' cache and its double, with the same records and slots of their own."""

    def __init__(self, shape: Shape) -> None:
        compared = Comparison(cache, shape)
        self.shape = shape
        self.kernels, self.kernels_slots = compared.cache, compared.slots
        self.double = RuleCache(
            num_layers=shape.num_layers,
            num_experts=shape.num_experts,
            num_slots=shape.num_slots,
            top_k=shape.top_k,
            max_tokens=shape.max_tokens,
        )
        self.double_slots = {
            name: torch.zeros_like(rows) for name, rows in compared.slots.items()
        }
        self.double.attach(LAYOUT, self.double_slots, compared.records)

    def call(self, layer: int, tokens: LayerTokens) -> None:
        """One layer call; what it is given and what it leaves behind."""
        ids = torch.arange(-2, self.shape.num_experts + 2, dtype=tokens.ids.dtype)
        if min(self.shape.num_experts, tokens.ids.numel()) <= self.shape.num_slots:
            maps = [self.kernels.bring(layer, tokens), self.double.bring(layer, tokens)]
            self.compare(maps, ids)
        else:
            waves = (part.waves(layer, tokens) for part in (self.kernels, self.double))
            for (slots, in_wave), (same_slots, in_same_wave) in zip(*waves, strict=True):
                self.compare([slots, same_slots], ids)
                if self.double.is_live:
                    assert torch.equal(in_wave, in_same_wave)
        assert torch.equal(self.kernels.log, self.double.log)
        assert torch.equal(self.kernels.counters, self.double.counters)

    def compare(self, maps: list[torch.Tensor], ids: torch.Tensor) -> None:
        """While the kernels of a call may look."""
        names = [part.rename(ids[: self.most_names]) for part in (self.kernels, self.double)]
        for mine, same in (maps, names):
            assert mine.dtype == same.dtype == torch.int32
            assert torch.equal(mine, same)
        for name, rows in self.kernels_slots.items():
            assert torch.equal(rows, self.double_slots[name]), name

    @property
    def most_names(self) -> int:
        return self.kernels._renamed.numel()


@pytest.mark.parametrize("num_ranks", [1, 2], ids=["alone", "one of two ranks"])
@pytest.mark.parametrize("max_tokens", [FEW, MANY])
@pytest.mark.parametrize("num_slots", [18, 9, 6, 4])
def test_double_does_what_the_kernels_do(num_slots, max_tokens, num_ranks) -> None:
    """Calls that are not live included."""
    shape = Shape(3, 6, 2, num_slots, max_tokens, num_ranks=num_ranks, dtype=np.int64)
    both = Both(shape)
    places = None if shape.expert_map is None else torch.from_numpy(shape.expert_map)
    lives = set()
    for is_live, layers in random_steps(shape, seed=num_slots, num_steps=4):
        lives.add(is_live)
        for part in (both.kernels, both.double):
            part.live.fill_(int(is_live))
        for layer, arrays in enumerate(layers):
            both.call(layer, LayerTokens(*map(torch.from_numpy, arrays), places))
    assert True in lives


@pytest.mark.parametrize("is_live", [False, True])
def test_double_notes_what_the_kernels_note(is_live: bool) -> None:
    """Where all experts are resident and somebody records."""
    shape = Shape(3, 6, 2, 1, MANY, padding="-1")
    both = Both(shape)
    for part in (both.kernels, both.double):
        part.live.fill_(int(is_live))
    for _, layers in random_steps(shape, seed=1, num_steps=3):
        for layer, arrays in enumerate(layers):
            for part in (both.kernels, both.double):
                part.note(layer, LayerTokens(*map(torch.from_numpy, arrays)))
        assert torch.equal(both.kernels.log, both.double.log)
        assert both.double.counters.tolist() == [0, 0]
    assert bool((both.double.log >= 0).any()) is is_live
