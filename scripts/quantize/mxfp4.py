"""The layout of gpt-oss checkpoints: a layer's experts in one tensor, in MXFP4."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scripts.quantize.e2m1 import nearest
from scripts.quantize.layout import Config, Layout, Sizes, require_multiple

BLOCK = 32
"""Inputs that share a scale, a power of two."""
SCALE_BIAS = 127


def encode(values: Tensor) -> tuple[Tensor, Tensor]:
    """Two values a byte, the first in the low bits, and the scales' exponents.

    The largest value of a block is at most 7 times its scale, so that no value is further
    from the nearest that can be written than half the distance between neighbours there.

    Args:
        values: float32 ``[..., in]``.

    Returns:
        uint8 ``[..., in / 32, 16]``, and uint8 ``[..., in / 32]``: the exponent plus 127.
    """
    blocks = values.reshape(*values.shape[:-1], -1, BLOCK)
    _, above = torch.frexp(blocks.abs().amax(dim=-1) * (8 / 7))
    exponent = (above - 3).clamp(-SCALE_BIAS, SCALE_BIAS)
    scaled = torch.ldexp(blocks, -exponent[..., None])
    return nearest(scaled), (exponent + SCALE_BIAS).to(torch.uint8)


class Mxfp4(Layout):
    """Experts of gpt-oss alone: two values of e2m1 a byte, a scale for 32 inputs."""

    def converts(self, name: str, shape: Sizes) -> bool:
        """See :class:`Layout`; biases stay as they are."""
        return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))

    def check(self, name: str, shape: Sizes) -> None:
        """See :class:`Layout`; ``shape`` is ``[experts, in, out]``."""
        require_multiple(name, "input size", shape[1], BLOCK)

    def tensors(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """``NAME_blocks`` uint8 ``[experts, out, in / 32, 16]``, ``NAME_scales`` uint8
        ``[experts, out, in / 32]``, of ``weight`` ``[experts, in, out]``."""
        # Expert by expert: a layer of a large model in float32 is gigabytes.
        parts = [encode(expert.float().T.contiguous()) for expert in weight]
        blocks, scales = zip(*parts, strict=True)
        return {f"{name}_blocks": torch.stack(blocks), f"{name}_scales": torch.stack(scales)}

    def config(self, kept: Sequence[str]) -> Config:
        """See :class:`Layout`; the list is that of the released models."""
        return {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        }
