"""Finds the model's routers, so that they can be asked ahead of their layer."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase

from vllm_moe_offload.lookahead import Router


def routers_of(model: torch.nn.Module, layers: list[Any]) -> list[Router] | None:
    """The routers of ``layers``, in order; None if one is not found or not like the others.

    A layer's router is the linear module with one output per expert beside it. Any such
    module will do: it only guesses, and how far it is right is measured.
    """
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    routers = [_router_of(modules, names[id(layer)], layer) for layer in layers]
    if any(router is None for router in routers):
        return None
    return [router for router in routers if router is not None]


def _router_of(modules: dict[str, torch.nn.Module], name: str, layer: Any) -> Router | None:
    parent = name
    while parent:
        parent = parent.rpartition(".")[0]
        linear = [
            module
            for module in modules[parent].children()
            if isinstance(module, LinearBase)
            and module.output_size == layer.moe_config.num_experts
            and module.input_size == layer.hidden_size
        ]
        if len(linear) == 1:
            return _logits_of(linear[0])
    return None


def _logits_of(linear: torch.nn.Module) -> Router:
    def logits(hidden: torch.Tensor) -> torch.Tensor:
        result = linear(hidden)
        found: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return found

    return logits
