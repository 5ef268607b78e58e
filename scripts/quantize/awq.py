"""The layout of AWQ checkpoints, as AutoAWQ writes them (version ``gemm``)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from scripts.quantize.integers import PER_WORD, asymmetric, grouped, packed
from scripts.quantize.layout import SUFFIX, Config, Layout, Sizes, require_multiple

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring outputs lies at each place of a word."""


class Awq(Layout):
    """Four bits with zero points, one scale per output and group of inputs."""

    def __init__(self, experts_only: bool, group_size: int) -> None:
        super().__init__(experts_only)
        self.group_size = group_size

    def check(self, name: str, shape: Sizes) -> None:
        """See :class:`Layout`."""
        require_multiple(name, "output size", shape[0], PER_WORD)
        require_multiple(name, "input size", shape[1], self.group_size)

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
