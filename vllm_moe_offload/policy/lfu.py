"""Least frequently used: all-time count of layer calls per (layer, expert)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from vllm_moe_offload.policy.base import FloatArray, PlainPolicy, PlannerRules


class LFU(PlainPolicy):
    """Evicts the expert with the fewest tokens routed to it so far; inserts every miss.

    Counts are float32: exact up to 2**24 tokens per expert, after which a count stands.
    """

    name: ClassVar[str] = "lfu"
    rules: ClassVar[PlannerRules] = PlannerRules(admission=False)

    def gain(self, votes: FloatArray) -> FloatArray:
        """One per token and expert."""
        return votes * np.float32(len(self.rows.requests))
