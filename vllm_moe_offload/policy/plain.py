"""Plain policies: scores that fade by a factor and gain by votes, and nothing else.

* ``lru``, ``lru-layer``: least recently used, over all layers or with an equal share of slots per
  layer. The core keeps the recency clock. One global LRU collapses once the cache is smaller than
  one pass over the layers: every expert is evicted just before its layer comes round again.
* ``lfu``: all-time count of layer calls per (layer, expert).
* ``lrfu``: counts that decay by half every few steps (Lee et al., 2001), with admission. Every MoE
  layer is visited once per step, in a cycle, so the value of an expert is the probability that its
  own layer uses it at the next visit. A decayed frequency estimates that directly, where recency
  alone cannot compare experts of different layers.
"""

from __future__ import annotations

import ctypes
from typing import ClassVar

import numpy as np

from vllm_moe_offload.cache.planner import (
    ORDER_RECENCY,
    SCOPE_PER_LAYER,
    ExpertCache,
    PlannerRules,
)
from vllm_moe_offload.native import GAIN_BY_USES, GAIN_BY_VOTES, SCORES_STAY, Observer
from vllm_moe_offload.policy.base import Policy, fade_and_gain
from vllm_moe_offload.step import FloatArray, IdArray

DEFAULT_HALF_LIFE_STEPS = 8.0


class PlainPolicy(Policy):
    """A policy whose scores fade by a factor and gain by votes, layer call by layer call.

    That is little enough for the core to do by itself in serving (``vmo_observer``).

    Attributes:
        follows: what scores gain: ``native.SCORES_STAY``, nothing; ``GAIN_BY_VOTES``, the
            votes; ``GAIN_BY_USES``, one per layer call, however many tokens chose the expert.
        decay: factor on a layer's scores at each of its calls.
    """

    follows: ClassVar[int]

    def __init__(self, num_layers: int, num_experts: int, decay: float = 1.0) -> None:
        super().__init__(num_layers, num_experts)
        self.decay = decay
        self._votes: FloatArray = np.zeros((num_layers, num_experts), np.float32)
        self._gains: FloatArray = np.ones(num_layers, np.float32)
        self._observer = Observer(
            votes=self._votes.ctypes.data,
            scores=self.scores.ctypes.data,
            gains=self._gains.ctypes.data,
            decay=decay,
            follows=self.follows,
        )

    def bind(self, cache: ExpertCache) -> None:
        """See :meth:`Policy.bind`."""
        super().bind(cache)
        self._observer.scores = self.scores.ctypes.data

    def native_observer(self, num_tokens: int, top_k: int) -> int:
        """See :meth:`Policy.native_observer`."""
        self._observer.ids_per_layer = num_tokens * top_k
        return ctypes.addressof(self._observer)

    def observe(self, layer: int, ids: IdArray, votes: FloatArray) -> None:
        """Fades the layer's scores and adds this call's gain."""
        if self.follows == SCORES_STAY:
            return
        self._votes[layer] = votes if self.follows == GAIN_BY_VOTES else votes > 0
        fade_and_gain(self._observer, layer, self.num_experts)


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


class LFU(PlainPolicy):
    """Evicts the expert that the fewest layer calls needed so far; inserts every miss.

    Counts are float32: exact up to 2**24 calls per expert, after which a count stands.
    """

    name: ClassVar[str] = "lfu"
    rules: ClassVar[PlannerRules] = PlannerRules(admission=False)
    follows: ClassVar[int] = GAIN_BY_USES


class LRFU(PlainPolicy):
    """Score = decayed share of the running requests' tokens; misses must earn their slot.

    Attributes:
        half_life_steps: steps after which a vote counts half.
    """

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
        self.half_life_steps = half_life
