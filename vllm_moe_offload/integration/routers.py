"""Finds the model's routers, so that they can be asked ahead of their layer."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase

from vllm_moe_offload.forecast.lookahead import Routers


def routers_of(model: torch.nn.Module, layers: list[Any]) -> Routers | None:
    """The routers of ``layers``; None if one is not found, or not like the others.

    A layer's router is the linear module with one output per expert beside it. Any such
    module will do: it only guesses, and how far it is right is measured. To be called when
    weights are loaded and not yet put into kernel form.
    """
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    found = [_router_of(modules, names[id(layer)], layer) for layer in layers]
    if any(router is None for router in found):
        return None
    routers: list[Any] = [router for router in found if router is not None]
    with_bias = [router for router in routers if getattr(router, "bias", None) is not None]
    if with_bias and len(with_bias) != len(routers):
        return None
    weight = torch.stack([router.weight.detach() for router in routers])
    bias = None
    if with_bias:
        bias = torch.stack([router.bias.detach() for router in routers])
    share = layers[0].share
    return Routers.of(weight, bias, None if share is None else share.experts)


def _router_of(
    modules: dict[str, torch.nn.Module], name: str, layer: Any
) -> torch.nn.Module | None:
    num_experts = layer.moe_config.num_experts
    parent = name
    while parent:
        parent = parent.rpartition(".")[0]
        linear = [
            module
            for module in modules[parent].children()
            if isinstance(module, LinearBase)
            and module.output_size == num_experts
            and module.input_size == layer.hidden_size
        ]
        if len(linear) == 1:
            weight = getattr(linear[0], "weight", None)
            if weight is None or not weight.is_floating_point():
                return None
            shape = (num_experts, layer.hidden_size)
            return linear[0] if tuple(weight.shape) == shape else None
    return None
