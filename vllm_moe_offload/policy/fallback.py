"""Plain policies as shadows, and the choice of the one that hits most.

A shadow is a cache without bytes: it plans from the same routing and counts its hits. The
idea is that of set duelling (Qureshi et al., 2007): let policies compete on the running
workload and follow the winner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.policy.base import FloatArray, IdArray, StepRows

PERIOD_STEPS = 32
"""Steps between two decisions."""
MEMORY = 0.85
"""Share of the older hits that a period keeps: about 200 steps count."""
MARGIN = 0.004
"""A challenger must hit this much more, as a share of all needs, to take over."""
WARM_UP_PERIODS = 8
"""Periods after a start or a change of rule before the next decision: a few hundred steps of
evidence, and caches that had time to fill."""


class Shadow(Protocol):
    """A policy with a cache of its own that holds no bytes."""

    name: str
    scores: FloatArray

    @property
    def hits(self) -> int:
        """Hits so far."""

    @property
    def misses(self) -> int:
        """Misses so far."""

    @property
    def resident(self) -> npt.NDArray[np.bool_]:
        """bool ``[layers, experts]``: what the shadow holds."""

    def begin_step(self, rows: StepRows) -> None:
        """See :class:`Policy`."""

    def observe(self, layer: int, ids: IdArray, votes: FloatArray) -> None:
        """Scores and plans one layer call."""

    def end_step(self) -> None:
        """See :class:`Policy`."""

    def end_request(self, request: str) -> None:
        """See :class:`Policy`."""


class Fallback:
    """Watches the shadows and names the winner.

    Attributes:
        winner: the plain shadow that rules now, None while the own policy does.
        switches: how often the rule changed hands.
    """

    def __init__(
        self, own: Shadow, plain: Sequence[Shadow], counters: npt.NDArray[np.int64]
    ) -> None:
        self._own = own
        self._plain = list(plain)
        self._counters = counters
        self._seen = np.zeros((len(plain) + 1, 2), np.int64)
        self._recent = np.zeros((len(plain) + 1, 2), np.float64)
        self._steps = 0
        self._warm_up = WARM_UP_PERIODS
        self.winner: Shadow | None = None
        self.switches = 0

    def begin_step(self, rows: StepRows) -> None:
        """A step begins."""
        for shadow in self._plain:
            shadow.begin_step(rows)

    def observe(self, layer: int, ids: IdArray, votes: FloatArray) -> None:
        """All shadows plan one layer call."""
        for shadow in self._plain:
            shadow.observe(layer, ids, votes)
        if self.winner is not None:
            self._own.observe(layer, ids, votes)

    def end_request(self, request: str) -> None:
        """A request ended."""
        for shadow in self._plain:
            shadow.end_request(request)

    def end_step(self) -> None:
        """Decides now and then who rules."""
        for shadow in self._plain:
            shadow.end_step()
        self._steps += 1
        if self._steps % PERIOD_STEPS:
            return
        totals = np.array(
            [self._own_total(), *((shadow.hits, shadow.misses) for shadow in self._plain)],
            np.int64,
        )
        self._recent = self._recent * MEMORY + (totals - self._seen)
        self._seen = totals
        if self._warm_up:
            self._warm_up -= 1
            return
        self._decide()

    def _own_total(self) -> tuple[int, int]:
        if self.winner is None:  # the cache itself does what the own policy wants
            return int(self._counters[0]), int(self._counters[1])
        return self._own.hits, self._own.misses

    def _decide(self) -> None:
        rates = self._recent[:, 0] / np.maximum(self._recent.sum(axis=1), 1.0)
        best = int(rates[1:].argmax()) + 1
        if self.winner is None:
            if rates[best] > rates[0] + MARGIN:
                self._hand_over(self._plain[best - 1])
        elif rates[0] >= rates[best]:
            self._hand_over(None)
        elif rates[best] > rates[self._plain.index(self.winner) + 1] + MARGIN:
            self._hand_over(self._plain[best - 1])

    def _hand_over(self, winner: Shadow | None) -> None:
        self._warm_up = WARM_UP_PERIODS
        self._recent[0] = 0  # counted by another cache, cold or stale, from now on
        self.winner = winner
        self.switches += 1
        self._seen[0] = self._own_total()

    def follow(self, scores: FloatArray) -> None:
        """Writes scores that turn the cache's contents into the winner's."""
        assert self.winner is not None
        scores[...] = self.winner.resident
