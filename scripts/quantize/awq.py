"""The layout of AWQ checkpoints, as AutoAWQ writes them (version ``gemm``)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from scripts.quantize.integers import PER_WORD, asymmetric, grouped, packed
from scripts.quantize.layout import SUFFIX, Config, GroupedLayout

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring outputs lies at each place of a word."""


class Awq(GroupedLayout):
    """Four bits with zero points, one scale per output and group of inputs."""

    outputs_per_word = PER_WORD

    def tensors(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """``qweight`` int32 ``[in, out / 8]``, ``qzeros`` int32 ``[groups, out / 8]``,
        ``scales`` ``[groups, out]``."""
        values, zero, scale = asymmetric(grouped(weight, self.group_size), 4, weight.dtype)
        module = name.removesuffix(SUFFIX)
        return {
            f"{module}.qweight": packed(values.flatten(1).T, dim=1, order=ORDER),
            f"{module}.qzeros": packed(zero.T, dim=1, order=ORDER),
            f"{module}.scales": scale.T.contiguous(),
        }

    def config(self, kept: Sequence[str]) -> Config:
        """See :class:`Layout`."""
        return {
            "bits": 4,
            "group_size": self.group_size,
            "modules_to_not_convert": list(kept),
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": True,
        }
