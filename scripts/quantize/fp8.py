"""The layout of fp8 checkpoints in blocks, as DeepSeek and Qwen release them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from scripts.quantize.integers import usable
from scripts.quantize.layout import SUFFIX, Config, Layout, Sizes, require_multiple

BLOCK = 128
"""Rows and columns that share a scale."""
JOINED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "w1", "w3")
"""Modules that vLLM puts one below the other: blocks must not lie across two."""
LARGEST = torch.finfo(torch.float8_e4m3fn).max


class Fp8(Layout):
    """Eight bits of floating point (e4m3), one scale per block of 128 x 128."""

    def check(self, name: str, shape: Sizes) -> None:
        """See :class:`Layout`; blocks at the edges may be smaller, but vLLM joins modules."""
        if name.removesuffix(SUFFIX).rsplit(".", 1)[-1] in JOINED:
            require_multiple(name, "output size", shape[0], BLOCK)

    def tensors(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """``weight`` float8 ``[out, in]``, ``weight_scale_inv`` float32
        ``[out / 128, in / 128]``, rounded up, by which it is to be multiplied."""
        rows, columns = weight.shape
        whole = pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
        blocks = whole.reshape(-(-rows // BLOCK), BLOCK, -(-columns // BLOCK), BLOCK)
        scale = usable(blocks.abs().amax(dim=(1, 3)) / LARGEST, torch.float32)
        values = (blocks / scale[:, None, :, None]).clamp(-LARGEST, LARGEST)
        stored = values.reshape(whole.shape)[:rows, :columns].to(torch.float8_e4m3fn)
        return {name: stored.contiguous(), f"{name}_scale_inv": scale}

    def config(self, kept: Sequence[str]) -> Config:
        """See :class:`Layout`."""
        return {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "modules_to_not_convert": list(kept),
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
        }
