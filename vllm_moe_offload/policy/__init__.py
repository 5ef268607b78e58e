"""Policies: who stays in the cache. :func:`make_policy` builds one from its name."""

from __future__ import annotations

from vllm_moe_offload.cache.planner import PlannerRules
from vllm_moe_offload.policy.base import Policy
from vllm_moe_offload.policy.belady import Belady
from vllm_moe_offload.policy.eamc import EAMC
from vllm_moe_offload.policy.plain import LFU, LRFU, LRU, LayerLRU
from vllm_moe_offload.policy.trace import TracePolicy
from vllm_moe_offload.step import StepTokens

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (LRU, LayerLRU, LFU, LRFU, EAMC, TracePolicy, Belady)
}

__all__ = [
    "POLICIES",
    "PlannerRules",
    "Policy",
    "StepTokens",
    "TracePolicy",
    "make_policy",
]


def make_policy(spec: str, num_layers: int, num_experts: int) -> Policy:
    """Policy from ``name`` or ``name:key=value[,key=value]``, e.g. ``lrfu:half_life=32``.

    Raises:
        ValueError: no such policy or parameter; says which exist.
    """
    name, _, parameters = spec.partition(":")
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; choose from {', '.join(POLICIES)}")
    keywords: dict[str, float] = {}
    for item in filter(None, parameters.split(",")):
        key, separator, value = item.partition("=")
        try:
            keywords[key] = float(value)
        except ValueError as error:
            raise ValueError(
                f"policy {spec!r}: {item!r} is not of the form key=number"
            ) from error
        if not separator:
            raise ValueError(f"policy {spec!r}: {item!r} is not of the form key=number")
    try:
        return POLICIES[name](num_layers, num_experts, **keywords)
    except TypeError as error:
        raise ValueError(f"policy {spec!r} takes no such parameter: {error}") from error
