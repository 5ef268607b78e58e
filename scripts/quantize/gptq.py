"""The layout of GPTQ checkpoints, first version, as AutoGPTQ and GPTQModel write them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from scripts.quantize.integers import PER_WORD, grouped, packed, symmetric
from scripts.quantize.layout import SUFFIX, Config, GroupedLayout


class Gptq(GroupedLayout):
    """Four bits, symmetric, one scale per output and group of inputs, in their order."""

    outputs_per_word = PER_WORD

    def tensors(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """``qweight`` int32 ``[in / 8, out]``, ``qzeros`` int32 ``[groups, out / 8]``,
        ``scales`` ``[groups, out]``, ``g_idx`` int32 ``[in]``."""
        values, scale = symmetric(grouped(weight, self.group_size), 4, weight.dtype)
        # The first version stores zero points less one.
        zeros = torch.full_like(scale.T, PER_WORD - 1, dtype=torch.int32)
        module = name.removesuffix(SUFFIX)
        return {
            f"{module}.qweight": packed(values.flatten(1).T + PER_WORD, dim=0),
            f"{module}.qzeros": packed(zeros, dim=1),
            f"{module}.scales": scale.T.contiguous(),
            f"{module}.g_idx": torch.arange(weight.shape[1], dtype=torch.int32)
            // self.group_size,
        }

    def config(self, kept: Sequence[str]) -> Config:
        """See :class:`Layout`. ``dynamic`` names what is left, by the ends of names."""
        ends = sorted({_end(module) for module in kept if module != "lm_head"})
        return {
            "bits": 4,
            "checkpoint_format": "gptq",
            "desc_act": False,
            "dynamic": {rf"-:.*\.{end}$": {} for end in ends},
            "group_size": self.group_size,
            "lm_head": False,
            "pack_dtype": "int32",
            "quant_method": "gptq",
            "sym": True,
        }


def _end(module: str) -> str:
    """Pattern of the name of a module below its layer."""
    return re.escape(re.sub(r"^.*layers\.\d+\.", "", module))
