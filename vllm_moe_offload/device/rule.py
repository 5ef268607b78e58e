"""What a layer call does to the cache that the device plans: the rule, in numpy.

One pool of slots for all layers, and every miss takes a slot: the one whose expert is worth least.
No admission and no staging, so slots for one layer's experts are all that exact output asks. What an
expert is worth is its decayed share of the running requests' tokens (as policy ``lrfu``), less by
``exp(-HORIZON * n / num_layers)`` if n layers come before its own: what comes soon is needed sooner.
Half of that distance is in the scores, where votes of later layers count less (:func:`gains`); layers
that were served already come in the next step, and count :data:`A_CYCLE` of their scores.

The kernels (``kernels.py``) do the same to the bit, replay uses this class. Votes are added as
integers, so that their sum does not depend on the order in which threads add.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.step import FloatArray, IdArray

Ints = npt.NDArray[np.int32]

VOTE_ONE = 1 << 30
"""A vote of 1 in fixed point. All votes of a step sum to 1 for an expert that every token chose once,
and of 2**20 tokens each still has 1,024 parts."""
HALF_LIFE_STEPS = 8.0
HORIZON = 0.5
"""An expert whose layer comes a cycle later is worth ``exp(-HORIZON)`` as much."""
A_CYCLE = float(np.float32(np.exp(-HORIZON)))
MAX_SLOTS = 16384
"""More than that the kernel that plans cannot look at: it holds what all slots are worth in the
registers of one block of threads."""
NO_SLOT = -1
NO_OWNER = -1


def fixed_point(weights: FloatArray) -> Ints:
    """Votes of tokens (``StepTokens.weights``, in [0, 1]) as int32, rounded down."""
    return (weights.astype(np.float64) * VOTE_ONE).astype(np.int32)


def fade_of(half_life_steps: float = HALF_LIFE_STEPS) -> np.float32:
    """Factor on a layer's scores at each of its calls."""
    if not half_life_steps > 0:
        raise ValueError(
            f"half_life must be a positive number of steps, got {half_life_steps:g}"
        )
    return np.float32(2.0 ** (-1.0 / half_life_steps))


def gains(num_layers: int) -> FloatArray:
    """What a vote in fixed point adds to a score of each layer: float32 ``[num_layers]``."""
    share = np.exp(-HORIZON * np.arange(num_layers) / num_layers)
    return (share / VOTE_ONE).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Wave:
    """Experts of a layer call that are computed together: all, unless the pool is too small.

    Attributes:
        call_map: int32 ``[num_experts + 1]``, slot per expert. Experts that are not of this wave have
            a stand-in, as has the last entry, where an id of -1 finds it: a slot of the wave, or 0.
        in_wave: bool ``[num_experts + 1]``, which experts are of this wave.
        pairs: int32 ``[misses, 2]``: record (``layer * num_experts + expert``) and slot it goes to.
    """

    call_map: Ints
    in_wave: npt.NDArray[np.bool_]
    pairs: Ints


class OnePool:
    """Page table, owners, scores, and counters.

    A call is :meth:`observe`, then :meth:`place` until :attr:`is_served`: once, unless the pool has
    fewer slots than the layer needs.

    Attributes:
        slot_of: int32 ``[num_layers, num_experts]``, slot or -1.
        owner: int32 ``[num_slots]``, ``layer * num_experts + expert`` or -1.
        score: float32 ``[num_layers, num_experts]``, decayed sums of votes times gains.
        need: bool ``[num_experts]``, what the open call needs and has not had yet.
        hits, misses: experts that calls needed and found resident, or not.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        num_slots: int,
        half_life_steps: float = HALF_LIFE_STEPS,
    ) -> None:
        """``num_slots`` must be positive."""
        if num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, got {num_slots}")
        self.num_layers = num_layers
        self.num_experts = num_experts
        self.slot_of: Ints = np.full((num_layers, num_experts), NO_SLOT, np.int32)
        self.owner: Ints = np.full(num_slots, NO_OWNER, np.int32)
        self.score: FloatArray = np.zeros((num_layers, num_experts), np.float32)
        self.need = np.zeros(num_experts, np.bool_)
        self.hits = 0
        self.misses = 0
        self._gain = gains(num_layers)
        self._fade = fade_of(half_life_steps)

    @property
    def is_served(self) -> bool:
        """Whether the open call had all that it needs."""
        return not self.need.any()

    def observe(self, layer: int, ids: IdArray, weights: Ints) -> None:
        """A layer call begins: its votes move the scores, and what it needs is known.

        Args:
            layer: index among the MoE layers.
            ids: integers ``[tokens, top_k]``, without padding; what is no expert's number, such as
                -1 for another rank's, is ignored. A token's ids differ: votes are int32 and wrap
                around where they sum to more than 1.
            weights: int32 ``[tokens]``, see :func:`fixed_point`.
        """
        known = (ids >= 0) & (ids < self.num_experts)
        chosen = ids[known]
        of_token = np.broadcast_to(weights[:, None], ids.shape)[known]
        # In float64 integers of this size are exact.
        votes = np.bincount(chosen, of_token, self.num_experts).astype(np.int64)
        score = self.score[layer]
        score *= self._fade
        score += votes.astype(np.int32).astype(np.float32) * self._gain[layer]
        self.need[:] = False
        self.need[chosen] = True
        num_hits = int(np.count_nonzero(self.slot_of[layer][self.need] >= 0))
        self.hits += num_hits
        self.misses += int(np.count_nonzero(self.need)) - num_hits

    def place(self, layer: int) -> Wave:
        """Finds slots for what the call needs, as far as there are any; the others stay needed."""
        slots = self.slot_of[layer]
        hits = self.need & (slots >= 0)
        missing = np.flatnonzero(self.need & (slots < 0))
        pairs = self._insert(layer, missing, hits)
        in_wave = np.append(self.need & (slots >= 0), False)
        call_map = np.append(slots, np.int32(0))
        call_map[~in_wave] = call_map[in_wave].min(initial=2**31 - 1) if in_wave.any() else 0
        self.need &= ~in_wave[:-1]
        return Wave(call_map, in_wave, pairs)

    def _insert(self, layer: int, missing: npt.NDArray[Any], hits: npt.NDArray[Any]) -> Ints:
        """Missing experts, by number, take slots by what these are worth, ties by slot."""
        if not missing.size:
            return np.zeros((0, 2), np.int32)
        first = layer * self.num_experts
        worth = self.score.reshape(-1)[self.owner]
        worth[self.owner < first + self.num_experts] *= np.float32(A_CYCLE)
        worth[self.owner == NO_OWNER] = -np.inf
        worth[self.slot_of[layer][hits]] = np.inf
        num_free = worth.size - np.count_nonzero(hits)
        victims = np.argsort(worth, kind="stable")[: min(missing.size, num_free)]
        records = first + missing[: victims.size]
        evicted = self.owner[victims]
        self.slot_of.reshape(-1)[evicted[evicted != NO_OWNER]] = NO_SLOT
        self.owner[victims] = records
        self.slot_of.reshape(-1)[records] = victims
        return np.stack([records, victims], axis=1).astype(np.int32)
