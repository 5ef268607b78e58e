"""What a worker knows of its experts, asked from outside; workers import this by name."""

from __future__ import annotations

from typing import Any

from vllm_moe_offload.metrics import VALUES


def inspect(model: Any) -> dict[str, Any]:
    """Classes of a model's expert layers and, with offload, what the runtime counted."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from vllm_moe_offload.device.runtime import DeviceRuntime

    layers = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    found: dict[str, Any] = {"classes": sorted({type(layer).__name__ for layer in layers})}
    runtime = getattr(layers[0], "runtime", None) if layers else None
    if isinstance(runtime, DeviceRuntime):
        found |= _of_device(runtime)
    elif runtime is not None:
        shape = runtime.cache.shape
        found["shape"] = [shape.num_slots, shape.num_staging_slots]
        found["hits"] = runtime.cache.count("hits")
        found["misses"] = runtime.cache.count("misses")
        found["prefetch_issued"] = runtime.cache.count("prefetch_issued")
        found["draft_needs"] = runtime.draft_hits + runtime.draft_misses
        found["read_bytes"] = runtime.read_bytes
        found["layers"], found["experts"] = shape.num_layers, shape.num_experts
    return found


def _of_device(runtime: Any) -> dict[str, Any]:
    """The same of a worker whose device plans, or keeps all experts. Its counters are looked at
    where there is nothing to compute: an engine in this process takes no step behind its last."""
    runtime.after_forward()
    figures = dict(zip(VALUES, runtime.published.values, strict=True))
    names = ("hits", "misses", "read_bytes", "tokens", "calls")
    counted = {name: int(figures[name]) for name in names}
    cache = runtime._cache
    in_vain = 0 if cache is None else cache.num_calls_in_vain
    return {**counted, "shape": [int(figures["slots"]), 0], "calls_in_vain": in_vain}
