"""The models of a worker: when the last of them has its weights, the runtime starts.

A drafter is loaded after the model. Its experts, if it has any, get slots of the model's pool, and
whatever else it holds is memory that the pool cannot have: so the model's experts wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vllm_moe_offload.config import OffloadConfig, OptionError
from vllm_moe_offload.forecast.lookahead import Routers
from vllm_moe_offload.integration.formats import ExpertFormat
from vllm_moe_offload.integration.speculation import loads_a_drafter
from vllm_moe_offload.integration.startup import start_runtime
from vllm_moe_offload.store import ExpertStore, joined


@dataclass(frozen=True, slots=True)
class LoadedExperts:
    """A model's experts, in their store.

    Attributes:
        layers: its RoutedExperts, without memory of their own.
        formats: of each.
        store: holds them.
        routers: of the layers, where they are known, for prediction.
    """

    layers: list[Any]
    formats: list[ExpertFormat]
    store: ExpertStore
    routers: Routers | None


_waiting: list[tuple[Any, LoadedExperts]] = []
"""The model's, with its VllmConfig, while its drafter is loaded."""


def model_is_loaded(vllm_config: Any, options: OffloadConfig, experts: LoadedExperts) -> None:
    """Starts the runtime, unless a drafter follows."""
    _waiting.clear()
    if loads_a_drafter(vllm_config):
        _waiting.append((vllm_config, experts))
    else:
        _start(vllm_config, options, experts, None)


def drafter_is_loaded(
    vllm_config: Any, options: OffloadConfig, experts: LoadedExperts | None
) -> None:
    """Starts the runtime; ``experts``: the drafter's, None if it has none in a store.

    Raises:
        OptionError: they cannot lie in one pool with the model's.
    """
    if _waiting and _waiting[0][0] is vllm_config:
        _, model = _waiting.pop()
        _start(vllm_config, options, model, experts)
    elif experts is not None:
        raise OptionError(
            "--moe-offload: the drafter has experts of its own, and the model has none in this "
            "pipeline stage; leave speculative_config out"
        )


def _start(
    vllm_config: Any,
    options: OffloadConfig,
    model: LoadedExperts,
    drafter: LoadedExperts | None,
) -> None:
    """Pool, cache and transfer; parameters become slots of the pool.

    vLLM loads with its device as torch's default: what is made here is meant for RAM
    unless it says otherwise.
    """
    models = [model] if drafter is None else [model, drafter]
    try:
        store = joined(*(one.store for one in models))
    except ValueError as error:
        raise OptionError(
            f"--moe-offload: the drafter's experts do not fit beside the model's in one cache: "
            f"{error}; leave speculative_config out"
        ) from error
    with torch.device("cpu"):
        start_runtime(
            vllm_config,
            options,
            store,
            model.layers,
            routers=model.routers,
            draft_layers=[] if drafter is None else drafter.layers,
        )
    for one in models:
        for layer, known in zip(one.layers, one.formats, strict=True):
            known.rebuild(layer.quant_method, layer)
