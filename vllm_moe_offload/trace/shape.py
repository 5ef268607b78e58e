"""How many layers and experts a file may speak of: what is read sets up tables of that size."""

from __future__ import annotations

MAX_LAYER_EXPERTS = 1 << 16
"""Routed experts of a layer: ids have two bytes in traces."""
MAX_EXPERTS = 1 << 22
"""Of all layers together; models of a trillion parameters have a hundredth of it."""


def shape_fault(num_layers: int, num_experts: int) -> str | None:
    """Why no model has such numbers of MoE layers, and of routed experts in each; None: one may."""
    if not 1 <= num_experts <= MAX_LAYER_EXPERTS:
        return f"num_experts must lie in [1, {MAX_LAYER_EXPERTS}], is {num_experts}"
    if not 1 <= num_layers <= MAX_EXPERTS // num_experts:
        return (
            f"there may be 1 to {MAX_EXPERTS} experts in all, not {num_layers} layers of "
            f"{num_experts}"
        )
    return None
