"""A replay that counts the first tokens of each request apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.policy import Policy
from vllm_moe_offload.replay.run import replay_step, unstaged
from vllm_moe_offload.replay.schedule import Schedule
from vllm_moe_offload.trace.routing import RoutingTrace

YOUNG_TOKENS = 16
"""Generated tokens of a request that count as its first ones."""

Prepare = Callable[[Policy], None]


@dataclass(frozen=True, slots=True)
class Counted:
    """Hits and needs of a replay.

    Attributes:
        hits, needs: int64 ``[steps]``, of all layer calls.
        young_hits, young_needs: of experts that the first generated tokens of a request need.
    """

    hits: npt.NDArray[np.int64]
    needs: npt.NDArray[np.int64]
    young_hits: int
    young_needs: int

    @property
    def rate(self) -> float:
        """Hit rate of everything."""
        return float(self.hits.sum() / max(self.needs.sum(), 1))

    @property
    def young_rate(self) -> float:
        """Hit rate of the first tokens."""
        return self.young_hits / max(self.young_needs, 1)


def replay_counted(
    trace: RoutingTrace,
    schedule: Schedule,
    name: str,
    capacity: float,
    prepare: Prepare | None = None,
) -> Counted:
    """Replays ``schedule`` by the rules of ``vllm_moe_offload/replay/run.py``.

    Args:
        trace: whose tokens the schedule names.
        schedule: which token runs when.
        name: of the policy.
        capacity: share of all experts that the cache holds.
        prepare: is given the policy before the first step.
    """
    policy, cache = unstaged(trace, name, capacity)
    if prepare is not None:
        prepare(policy)
    policy.bind(cache)
    routed, young = trace.routed, _young(schedule)
    totals = np.zeros((schedule.num_steps + 1, 2), np.int64)
    first = np.zeros(2, np.int64)
    for step in range(schedule.num_steps):
        for request in schedule.ended[step]:
            policy.end_request(str(request))
        ids = schedule.ids(routed, step)
        watched = ids[:, young[schedule.offsets[step] : schedule.offsets[step + 1]]]

        def count(layer: int, watched: npt.NDArray[np.int32] = watched) -> None:
            needed = np.unique(watched[layer])
            first[0] += np.count_nonzero(cache.page_table[layer, needed] >= 0)
            first[1] += needed.size

        replay_step(policy, cache, schedule.tokens(step), ids, count if watched.size else None)
        totals[step + 1] = cache.count("hits"), cache.count("hits") + cache.count("misses")
    hits, needs = np.diff(totals, axis=0).T
    return Counted(hits, needs, int(first[0]), int(first[1]))


def _young(schedule: Schedule) -> npt.NDArray[np.bool_]:
    """bool ``[tokens]``: whether it is one of its request's first generated ones."""
    age = schedule.position - schedule.prefill_ends[schedule.request]
    return (age >= 0) & (age < YOUNG_TOKENS)
