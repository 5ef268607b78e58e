"""What a worker knows of its experts, asked from outside; workers import this by name."""

from __future__ import annotations

from typing import Any


def inspect(model: Any) -> dict[str, Any]:
    """Classes of a model's expert layers and, with offload, what the runtime counted."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    layers = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    found: dict[str, Any] = {"classes": sorted({type(layer).__name__ for layer in layers})}
    runtime = getattr(layers[0], "runtime", None) if layers else None
    if runtime is not None:
        shape = runtime.cache.shape
        found["shape"] = [shape.num_slots, shape.num_staging_slots]
        found["hits"] = runtime.cache.count("hits")
        found["misses"] = runtime.cache.count("misses")
        found["prefetch_issued"] = runtime.cache.count("prefetch_issued")
        found["draft_needs"] = runtime.draft_hits + runtime.draft_misses
        found["read_bytes"] = runtime.read_bytes
        found["layers"], found["experts"] = shape.num_layers, shape.num_experts
    return found
