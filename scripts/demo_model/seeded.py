"""Random numbers from a seed and a name."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator(seed: int, name: str) -> torch.Generator:
    """Random numbers for ``name`` alone: tensors do not depend on the order of writing."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def normal(rng: torch.Generator, *shape: int) -> Tensor:
    """Unit normal values in double precision, for planted matrices (small)."""
    return torch.randn(shape, generator=rng, dtype=torch.float64)
