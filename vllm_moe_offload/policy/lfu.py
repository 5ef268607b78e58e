"""Least frequently used: all-time count of layer calls per (layer, expert)."""

from __future__ import annotations

from typing import ClassVar

from vllm_moe_offload.policy.base import FloatArray, IdArray, PlannerRules, Policy


class LFU(Policy):
    """Evicts the expert with the fewest tokens routed to it so far; inserts every miss.

    Counts are float32: exact up to 2**24 tokens per expert, after which a count stands.
    """

    name: ClassVar[str] = "lfu"
    rules: ClassVar[PlannerRules] = PlannerRules(admission=False)

    def observe(self, layer: int, ids: IdArray, votes: FloatArray) -> None:
        """Adds one per token and expert."""
        self.scores[layer] += votes * len(self.rows.requests)
