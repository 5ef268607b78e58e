"""A loaded layer's experts as tensors with a row each: from vLLM's parameters to records."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vllm_moe_offload.cache.layout import ExpertLayout, TensorSpec
from vllm_moe_offload.config import OptionError
from vllm_moe_offload.integration.formats import expert_parameters


def expert_tensors(layer: Any) -> dict[str, torch.Tensor]:
    """Parameters with one row per expert, in registration order.

    Raises:
        OptionError: a parameter has other rows; names it.
    """
    tensors = {}
    for name in expert_parameters(layer):
        parameter = getattr(layer, name)
        if parameter.shape[:1] != (layer.local_num_experts,):
            raise OptionError(
                f"--moe-offload: parameter {name} of {layer.layer_name} has shape "
                f"{tuple(parameter.shape)}, not one row for each of "
                f"{layer.local_num_experts} experts; use --moe-offload=off"
            )
        if parameter[0].numel():
            tensors[name] = parameter.data
    return tensors


def check_on_host(layer: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Raises OptionError unless a layer's tensors, which are to be written, lie in RAM."""
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu":
            raise OptionError(
                f"--moe-offload: {type(layer.quant_method).__name__} left {name} of "
                f"{layer.layer_name} on {tensor.device} instead of RAM; use --moe-offload=off"
            )


def layout_of(tensors: dict[str, torch.Tensor]) -> ExpertLayout:
    """Of one row of each tensor."""
    return ExpertLayout(
        tuple(
            TensorSpec(
                name,
                tuple(tensor.shape[1:]),
                str(tensor.dtype).removeprefix("torch."),
                tensor[0].numel() * tensor.element_size(),
            )
            for name, tensor in tensors.items()
        )
    )


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """A tensor ``[experts, ...]`` in RAM as uint8 ``[experts, nbytes]``."""
    rows = tensor.contiguous().view(tensor.shape[0], -1)
    return rows.view(torch.uint8).numpy()


def free(layer: Any) -> None:
    """Gives a layer's own expert memory back; its slots come from the pool."""
    for name in expert_parameters(layer):
        parameter = getattr(layer, name)
        parameter.data = parameter.data.new_empty((layer.local_num_experts, 0))
