"""Layouts of compressed-tensors, which llm-compressor writes: four and eight bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scripts.quantize.integers import PER_WORD, grouped, packed, symmetric
from scripts.quantize.layout import SUFFIX, Config, GroupedLayout, Layout, Sizes

VERSION = "0.17.0"


def _arguments(bits: int, strategy: str, **others: object) -> Config:
    """Description of quantised weights or activations."""
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "num_bits": bits,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": strategy,
        "symmetric": True,
        "type": "int",
        **others,
    }


def _config(
    storage: str, weights: Config, activations: Config | None, kept: Sequence[str]
) -> Config:
    group: Config = {
        "format": storage,
        "input_activations": activations,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }
    return {
        "config_groups": {"group_0": group},
        "format": storage,
        "global_compression_ratio": None,
        "ignore": list(kept),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


class PackQuantized(GroupedLayout):
    """Four bits, symmetric, one scale per row and group of inputs."""

    def tensors(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """``weight_packed`` int32 ``[out, in / 8]``, ``weight_scale`` ``[out, in / group]``,
        ``weight_shape`` int64 ``[2]``."""
        values, scale = symmetric(grouped(weight, self.group_size), 4, weight.dtype)
        module = name.removesuffix(SUFFIX)
        return {
            f"{module}.weight_packed": packed(values.flatten(1) + PER_WORD, dim=1),
            f"{module}.weight_scale": scale,
            f"{module}.weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
        }

    def config(self, kept: Sequence[str]) -> Config:
        """See :class:`Layout`."""
        weights = _arguments(4, "group", group_size=self.group_size)
        return _config("pack-quantized", weights, None, kept)


class IntQuantized(Layout):
    """Eight bits, symmetric, one scale per row; activations likewise, per token, as they come."""

    def check(self, name: str, shape: Sizes) -> None:
        """Every shape can be stored."""

    def tensors(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """``weight`` int8 ``[out, in]``, ``weight_scale`` ``[out, 1]``."""
        values, scale = symmetric(weight.float()[:, None], 8, weight.dtype)
        return {name: values[:, 0].to(torch.int8), f"{name}_scale": scale}

    def config(self, kept: Sequence[str]) -> Config:
        """See :class:`Layout`."""
        activations = _arguments(8, "token", dynamic=True, observer=None)
        return _config("int-quantized", _arguments(8, "channel"), activations, kept)
