"""Shadow caches: a plain policy and a planner without bytes, driven by the same routing."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.cache.planner import CacheShape, ExpertCache, PlannerRules
from vllm_moe_offload.policy import Policy, TracePolicy, make_policy
from vllm_moe_offload.policy.plain import PlainPolicy
from vllm_moe_offload.step import FloatArray

PLAIN_POLICIES = ("lru", "lru-layer", "lfu", "lrfu")
LARGEST_SHADOWED = 16384
"""Experts in all layers beyond which shadows would cost more than 2 % of a step."""


class ShadowCache:
    """Implements :class:`vllm_moe_offload.policy.fallback.Shadow`.

    A shadow of a plain policy keeps that policy's scores by itself.

    Attributes:
        name: of the policy; ``own`` for a cache that plans from somebody else's scores.
        scores: float32 ``[layers, experts]`` from which it plans.
    """

    def __init__(
        self, policy: PlainPolicy | None, shape: CacheShape, rules: PlannerRules
    ) -> None:
        self.name = policy.name if policy is not None else "own"
        self._policy = policy
        self._cache = ExpertCache(shape, rules, unbounded_staging=True)
        self.scores: FloatArray = self._cache.scores
        if policy is not None:
            policy.bind(self._cache.scores)

    @property
    def hits(self) -> int:
        """Hits so far."""
        return self._cache.count("hits")

    @property
    def resident(self) -> npt.NDArray[np.bool_]:
        """bool ``[layers, experts]``: what the shadow holds."""
        return self._cache.page_table >= 0

    def drive(self, first_layer: int, ids: npt.NDArray[np.int32], votes: FloatArray) -> None:
        """Scores and plans consecutive layers as the policy would call by call."""
        assert self._policy is not None
        self._cache.drive(first_layer, ids, self._policy.gain(votes), self._policy.decay)

    def drive_with(self, ids: npt.NDArray[np.int32], gain: FloatArray, decay: float) -> None:
        """Plans all layers; each one's scores fade by ``decay`` and gain ``gain`` first."""
        self._cache.drive(0, ids, gain, decay)


def bind_policy(policy: Policy, cache: ExpertCache) -> None:
    """Makes ``policy`` write ``cache``'s scores; gives ``trace`` its shadows.

    Whoever builds a cache calls this instead of ``policy.bind``. Where everything fits, there
    is nothing to choose: ``trace`` then only fills its collection.
    """
    policy.bind(cache.scores)
    shape = cache.shape
    if not isinstance(policy, TracePolicy):
        return
    policy.is_scoring = not shape.holds_everything
    if (
        not policy.options.fallback
        or shape.holds_everything
        or shape.num_layers * shape.num_experts > LARGEST_SHADOWED
    ):
        return
    shadowed = CacheShape(shape.num_layers, shape.num_experts, shape.num_slots)
    plain = []
    for name in PLAIN_POLICIES:
        rival = make_policy(name, shape.num_layers, shape.num_experts)
        assert isinstance(rival, PlainPolicy)
        plain.append(ShadowCache(rival, shadowed, rival.rules))
    policy.attach_shadows(ShadowCache(None, shadowed, policy.rules), plain)
