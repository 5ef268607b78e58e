"""Least recently used, over all layers or with an equal share of slots per layer.

The core keeps the recency clock; these policies only choose its rules. One global LRU
collapses once the cache is smaller than one pass over the layers: every expert is evicted
just before its layer comes round again. Hence ``lru-layer``.
"""

from __future__ import annotations

from typing import ClassVar

from vllm_moe_offload.native import SCORES_STAY
from vllm_moe_offload.policy.base import (
    ORDER_RECENCY,
    SCOPE_PER_LAYER,
    PlainPolicy,
    PlannerRules,
)


class LRU(PlainPolicy):
    """Evicts the expert whose layer call lies furthest back; every miss is inserted."""

    name: ClassVar[str] = "lru"
    rules: ClassVar[PlannerRules] = PlannerRules(order=ORDER_RECENCY, admission=False)
    follows: ClassVar[int] = SCORES_STAY  # the core's clock is the state


class LayerLRU(LRU):
    """LRU within each layer's equal share of the slots."""

    name: ClassVar[str] = "lru-layer"
    rules: ClassVar[PlannerRules] = PlannerRules(
        order=ORDER_RECENCY, scope=SCOPE_PER_LAYER, admission=False
    )
