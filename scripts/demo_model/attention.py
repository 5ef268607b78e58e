"""Attention that looks back: geometry and tensors of a layer.

Weights fall with distance, topics of the context are carried on, and which words were there
is written down.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from scripts.demo_model.architectures import (
    MLA_NOPE_DIM,
    MLA_RANK,
    MLA_ROPE_DIM,
    MLA_V_DIM,
    Shape,
)
from scripts.demo_model.plant import GAINS, Plant
from scripts.demo_model.seeded import normal
from scripts.demo_model.weights import Weight, constant, gaussian


class Attention:
    """Attention of all architectures but DeepSeek's: grouped queries, rotary positions."""

    def __init__(self, arch: str, shape: Shape, plant: Plant) -> None:
        self.arch, self.shape, self.plant = arch, shape, plant

    @cached_property
    def head_dim(self) -> int:
        """Width of an attention head; the CPU backend knows 32 and 64."""
        return 64 if self.shape.hidden >= 256 and self.shape.hidden % 64 == 0 else 32

    @cached_property
    def heads(self) -> int:
        """Query heads of a layer."""
        return self.shape.hidden // self.head_dim

    @cached_property
    def kv_heads(self) -> int:
        """Key and value heads of a layer."""
        if self.arch == "olmoe":
            return self.heads
        most = max(1, self.heads // 4)
        return next(n for n in range(most, 0, -1) if self.heads % n == 0)

    @cached_property
    def key_size(self) -> float:
        """Each rotary entry of queries and keys such that scores reach ``GAINS.recency``."""
        scale = math.sqrt(self.score_dim)
        return math.sqrt(GAINS.recency * scale / self.rotary_dim)

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that positions rotate."""
        return self.head_dim

    @property
    def score_dim(self) -> int:
        """Dimensions of a head that scores are sums over."""
        return self.head_dim

    @property
    def value_width(self) -> int:
        """Distinct things one attention layer reads of a token."""
        return self.kv_heads * self.head_dim

    @property
    def value_groups(self) -> int:
        """Groups of heads with values of their own."""
        return self.kv_heads

    def weights(self, prefix: str) -> Iterator[Weight]:
        """Tensors of one layer."""
        hidden, width, values = self.shape.hidden, self.head_dim, self.value_width
        every = self.heads * width
        for name, heads in (("q_proj", self.heads), ("k_proj", self.kv_heads)):
            yield self._look_back(f"{prefix}.{name}.weight", heads, 0, width)
        yield Weight(
            f"{prefix}.v_proj.weight",
            (values, hidden),
            lambda rng: self.plant.read_rows(values),
        )
        yield Weight(f"{prefix}.o_proj.weight", (hidden, every), lambda rng: self._write())
        if self.arch == "gpt_oss":
            sizes = {"q_proj": every, "k_proj": values, "v_proj": values, "o_proj": hidden}
            for name, size in sizes.items():
                yield gaussian(f"{prefix}.{name}.bias", (size,), 0.02)
            yield gaussian(f"{prefix}.sinks", (self.heads,), 1.0)
        elif self.arch == "qwen3_moe":
            yield constant(f"{prefix}.q_norm.weight", width, self.key_size)
            yield constant(f"{prefix}.k_norm.weight", width, self.key_size)
        elif self.arch == "olmoe":
            yield constant(f"{prefix}.q_norm.weight", every, self.key_size)
            yield constant(f"{prefix}.k_norm.weight", values, self.key_size)

    def _look_back(self, name: str, heads: int, plain: int, rotary: int) -> Weight:
        """A query or key projection with ``plain`` then ``rotary`` dimensions a head."""
        return Weight(
            name,
            (heads * (plain + rotary), self.shape.hidden),
            lambda rng: self._position_rows(rng, heads, plain, rotary),
        )

    def _position_rows(
        self, rng: torch.Generator, heads: int, plain: int, rotary: int
    ) -> Tensor:
        """Rows that make queries and keys the same for every token, but for some noise.

        Rotary embedding of a constant vector leaves a score that falls with the distance.
        """
        hidden = self.shape.hidden
        rows = 0.2 * normal(rng, heads, plain + rotary, hidden)
        rows[:, plain:] += self.key_size / GAINS.anchor * self.plant.anchor
        return rows.reshape(-1, hidden) / math.sqrt(hidden)

    def _write(self) -> Tensor:
        """[H, heads * head width]: heads with the same values share the writing."""
        columns = self.plant.write_columns(self.value_width, self.shape.layers)
        sharing = self.heads // self.value_groups
        hidden = self.shape.hidden
        per_group = columns.reshape(hidden, self.value_groups, 1, -1) / sharing
        return per_group.expand(-1, -1, sharing, -1).reshape(hidden, -1)


class LatentAttention(Attention):
    """DeepSeek's attention: keys and values share one latent vector per token."""

    rotary_dim = MLA_ROPE_DIM
    score_dim = MLA_NOPE_DIM + MLA_ROPE_DIM
    value_width = MLA_V_DIM
    value_groups = 1

    @cached_property
    def heads(self) -> int:
        """See :class:`Attention`."""
        return 4 if self.shape.hidden < 1024 else 8

    @cached_property
    def kv_heads(self) -> int:
        """See :class:`Attention`."""
        return self.heads

    def weights(self, prefix: str) -> Iterator[Weight]:
        """See :class:`Attention`."""
        hidden, heads = self.shape.hidden, self.heads
        yield self._look_back(f"{prefix}.q_proj.weight", heads, MLA_NOPE_DIM, MLA_ROPE_DIM)
        yield Weight(
            f"{prefix}.kv_a_proj_with_mqa.weight",
            (MLA_RANK + MLA_ROPE_DIM, hidden),
            self._latent_rows,
        )
        yield constant(f"{prefix}.kv_a_layernorm.weight", MLA_RANK)
        yield Weight(
            f"{prefix}.kv_b_proj.weight",
            (heads * (MLA_NOPE_DIM + MLA_V_DIM), MLA_RANK),
            self._latent_heads,
        )
        yield Weight(
            f"{prefix}.o_proj.weight", (hidden, heads * MLA_V_DIM), lambda rng: self._write()
        )

    def _latent_rows(self, rng: torch.Generator) -> Tensor:
        """[rank + rope, H]: what is read, filled up with noise; then the shared rotary key."""
        noise = normal(rng, MLA_RANK, self.shape.hidden) / math.sqrt(self.shape.hidden)
        noise[: self.value_width] = self.plant.read_rows(self.value_width)
        return torch.cat([noise, self._position_rows(rng, 1, 0, MLA_ROPE_DIM)])

    def _latent_heads(self, rng: torch.Generator) -> Tensor:
        """[heads * (nope + v), rank]: per head a faint key, then the values as read."""
        key = 0.2 * normal(rng, self.heads, MLA_NOPE_DIM, MLA_RANK) / math.sqrt(MLA_RANK)
        value = torch.eye(MLA_V_DIM, MLA_RANK, dtype=torch.float64)
        value = value.expand(self.heads, -1, -1)
        return torch.cat([key, value], dim=1).reshape(-1, MLA_RANK)
