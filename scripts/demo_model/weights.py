"""Tensors of a checkpoint that are not made yet."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from scripts.demo_model.architectures import BF16_BYTES
from scripts.demo_model.seeded import generator


@dataclass(frozen=True)
class Weight:
    """One tensor of the checkpoint: its name, its shape and how to make it."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[torch.Generator], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes in bfloat16."""
        return math.prod(self.shape) * BF16_BYTES


def gaussian(name: str, shape: tuple[int, ...], std: float) -> Weight:
    """A tensor of normal values; made row by row, as it may be as big as a layer."""

    def make(rng: torch.Generator) -> Tensor:
        out = torch.empty(shape, dtype=torch.bfloat16)
        for part in out if out.dim() > 2 else (out,):
            part.copy_(torch.empty(part.shape).normal_(std=std, generator=rng))
        return out

    return Weight(name, shape, make)


@lru_cache(maxsize=1)
def _noise(seed: int, size: int) -> Tensor:
    """[size] unit normal values, made once for a model's experts."""
    return torch.empty(size, dtype=torch.float32).normal_(generator=generator(seed, "noise"))


def window(name: str, shape: tuple[int, ...], std: float, seed: int) -> Weight:
    """A tensor of normal values cut from a block of twice its size, where its name says.

    Drawing numbers for every tensor takes longer than a fast disk takes to write them.
    """
    size = math.prod(shape)

    def make(rng: torch.Generator) -> Tensor:
        begin = int(torch.randint(size + 1, (), generator=rng))
        return (_noise(seed, 2 * size)[begin : begin + size] * std).reshape(shape)

    return Weight(name, shape, make)


def constant(name: str, size: int, value: float = 1.0) -> Weight:
    """A vector of ``size`` times ``value``."""
    return Weight(name, (size,), lambda rng: torch.full((size,), value))
