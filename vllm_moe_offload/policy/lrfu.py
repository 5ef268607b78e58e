"""LRFU: counts that decay by half every few steps (Lee et al., 2001), with admission.

Every MoE layer is visited once per step, in a cycle, so the value of an expert is the
probability that its own layer uses it at the next visit. A decayed frequency estimates
that directly, where recency alone cannot compare experts of different layers.
"""

from __future__ import annotations

from typing import ClassVar

from vllm_moe_offload.native import GAIN_BY_VOTES
from vllm_moe_offload.policy.base import PlainPolicy, PlannerRules

DEFAULT_HALF_LIFE_STEPS = 8.0


class LRFU(PlainPolicy):
    """Score = decayed share of the running requests' tokens; misses must earn their slot."""

    name: ClassVar[str] = "lrfu"
    rules: ClassVar[PlannerRules] = PlannerRules(admission=True)
    follows: ClassVar[int] = GAIN_BY_VOTES

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        half_life: float = DEFAULT_HALF_LIFE_STEPS,
    ) -> None:
        """``half_life`` in steps, positive."""
        if not half_life > 0:
            raise ValueError(
                f"lrfu:half_life must be a positive number of steps, got {half_life}"
            )
        super().__init__(num_layers, num_experts, decay=2.0 ** (-1.0 / half_life))
