"""The layout of NVFP4 checkpoints, which NVIDIA's ModelOpt writes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scripts.quantize.e2m1 import LARGEST, nearest
from scripts.quantize.integers import usable
from scripts.quantize.layout import (
    SUFFIX,
    Config,
    Layout,
    QuantizeError,
    Sizes,
    require_multiple,
)

BLOCK = 16
"""Inputs that share a scale."""
TENSOR_SCALE = 2.0**-10
"""Of every tensor, where ModelOpt takes a scale for each: gate and up must have the same."""
LARGEST_BLOCK_SCALE = torch.finfo(torch.float8_e4m3fn).max


class Nvfp4(Layout):
    """Two values of e2m1 a byte, a scale in e4m3 for 16 inputs, another for the tensor."""

    def check(self, name: str, shape: Sizes) -> None:
        """See :class:`Layout`."""
        require_multiple(name, "input size", shape[1], BLOCK)

    def tensors(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """``weight`` uint8 ``[out, in / 2]``, ``weight_scale`` float8 ``[out, in / 16]``,
        ``weight_scale_2`` and ``input_scale`` float32 ``[]``.

        Raises:
            QuantizeError: a value is too large for the scale of all tensors.
        """
        blocks = weight.float().reshape(weight.shape[0], -1, BLOCK)
        most = blocks.abs().amax(dim=2)
        limit = LARGEST * LARGEST_BLOCK_SCALE * TENSOR_SCALE
        if float(most.max()) > limit:
            raise QuantizeError(
                f"{name} has a value of {float(most.max()):.3g}; nvfp4 here allows {limit:.3g}"
            )
        stored = (most / LARGEST / TENSOR_SCALE).to(torch.float8_e4m3fn)
        scale = usable(stored.float(), torch.float32)
        values = blocks / (scale * TENSOR_SCALE)[..., None]
        module = name.removesuffix(SUFFIX)
        return {
            name: nearest(values).flatten(1),
            f"{module}.weight_scale": scale.to(torch.float8_e4m3fn),
            f"{module}.weight_scale_2": torch.tensor(TENSOR_SCALE),
            f"{module}.input_scale": torch.tensor(1.0),
        }

    def config(self, kept: Sequence[str]) -> Config:
        """See :class:`Layout`."""
        numbers: Config = {
            "dynamic": False,
            "group_size": BLOCK,
            "num_bits": 4,
            "type": "float",
        }
        return {
            "config_groups": {
                "group_0": {
                    "input_activations": numbers,
                    "targets": ["Linear"],
                    "weights": numbers,
                }
            },
            "ignore": list(kept),
            "producer": {"name": "modelopt", "version": "0.41.0"},
            "quant_algo": "NVFP4",
            "quant_method": "modelopt",
        }
