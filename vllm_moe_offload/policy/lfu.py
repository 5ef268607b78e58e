"""Least frequently used: all-time count of layer calls per (layer, expert)."""

from __future__ import annotations

from typing import ClassVar

from vllm_moe_offload.native import GAIN_BY_USES
from vllm_moe_offload.policy.base import PlainPolicy, PlannerRules


class LFU(PlainPolicy):
    """Evicts the expert that the fewest layer calls needed so far; inserts every miss.

    Counts are float32: exact up to 2**24 calls per expert, after which a count stands.
    """

    name: ClassVar[str] = "lfu"
    rules: ClassVar[PlannerRules] = PlannerRules(admission=False)
    follows: ClassVar[int] = GAIN_BY_USES
