"""Plain policies as shadows, and the choice of the one that hits most.

A shadow is a cache without bytes: it plans from the same routing and counts its hits. The
idea is that of set duelling (Qureshi et al., 2007): let policies compete on the running
workload and follow the winner. The own policy is judged by a shadow, too, so that prefetches
and a change of rule favour nobody.

Shadows see the same steps, so what counts is the difference of their hits step by step, which
varies far less than the hits themselves. The rule changes hands once a rival's lead is more
than chance (:data:`EVIDENCE`) and has paid for the change (:data:`COST`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.step import FloatArray

EVIDENCE = 3.0
"""Standard errors by which the mean difference must exceed 0: it is asked at every step, and
two would be exceeded by chance every few hundred."""
COST = 1.0
"""Lead that a rival must have, in misses per expert that the caches hold apart: as many misses
as the change may cost at most."""
MEMORY_STEPS = 200.0
"""Steps after which a difference counts 1/e: a request's worth, so that a lead of long ago
does not stand against a shift of the workload."""


class Shadow(Protocol):
    """A policy with a cache of its own that holds no bytes."""

    name: str
    scores: FloatArray

    @property
    def hits(self) -> int:
        """Hits so far."""

    @property
    def resident(self) -> npt.NDArray[np.bool_]:
        """bool ``[layers, experts]``: what the shadow holds."""

    def drive(self, first_layer: int, ids: npt.NDArray[np.int32], votes: FloatArray) -> None:
        """Scores and plans consecutive layers; ids ``[layers, tokens, top_k]``, votes
        ``[layers, experts]``.
        """

    def drive_with(self, ids: npt.NDArray[np.int32], gain: FloatArray, decay: float) -> None:
        """Plans all layers; each one's scores fade by ``decay`` and gain ``gain`` first."""


class Fallback:
    """Watches the shadows and names the winner.

    Attributes:
        winner: the plain shadow that rules now, None while the own policy does.
        switches: how often the rule changed hands.
    """

    def __init__(self, own: Shadow, plain: Sequence[Shadow]) -> None:
        self._shadows = [own, *plain]
        count = len(self._shadows)
        self._hits: npt.NDArray[np.int64] = np.zeros(count, np.int64)
        self._ruler = 0
        self._next_ruler = 0
        self._keep = 1.0 - 1.0 / MEMORY_STEPS
        # Of the ruler's rivals: decayed number of steps, sum of leads, sum of their squares.
        self._steps = 0.0
        self._lead: npt.NDArray[np.float64] = np.zeros(count)
        self._square: npt.NDArray[np.float64] = np.zeros(count)
        self.switches = 0

    @property
    def winner(self) -> Shadow | None:
        """The plain shadow that rules now, None while the own policy does."""
        return self._shadows[self._ruler] if self._ruler else None

    @property
    def is_decided(self) -> bool:
        """Whether the rule is to change hands: :meth:`change` must be called between steps."""
        return self._next_ruler != self._ruler

    def change(self) -> None:
        """Hands the rule over, if that was decided."""
        if self.is_decided:
            self._ruler = self._next_ruler
            self.switches += 1

    def expect(self, scores: FloatArray) -> None:
        """The own policy's scores at the step's beginning."""
        self._shadows[0].scores[...] = scores

    def lead(
        self,
        layer: int,
        ids: npt.NDArray[np.int32],
        votes: FloatArray,
        scores: FloatArray,
    ) -> None:
        """Lets the winner plan one layer call, and makes the cache follow it.

        Args:
            layer: that was routed.
            ids: ``[layers, tokens, top_k]`` of the step so far.
            votes: ``[experts]`` of the layer.
            scores: the cache's; 1 for what the winner holds now, 0 for the rest.
        """
        winner = self._shadows[self._ruler]
        winner.drive(layer, ids[layer : layer + 1], votes[None])
        scores[...] = winner.resident

    def end_step(
        self, ids: npt.NDArray[np.int32], votes: FloatArray, gain: FloatArray, decay: float
    ) -> None:
        """The other shadows take a step in; decides who is to rule.

        Args:
            ids: ``[layers, tokens, top_k]``.
            votes: ``[layers, experts]``.
            gain, decay: what the own policy's scores did at each layer's call.
        """
        self._shadows[0].drive_with(ids, gain, decay)
        for index, shadow in enumerate(self._shadows):
            if index not in (0, self._ruler):
                shadow.drive(0, ids, votes)
        hits = np.array([shadow.hits for shadow in self._shadows], np.int64)
        ahead = (hits - self._hits).astype(np.float64)
        self._hits = hits
        ahead -= ahead[self._ruler]
        self._steps = self._steps * self._keep + 1.0
        self._lead = self._lead * self._keep + ahead
        self._square = self._square * self._keep + ahead * ahead
        self._decide()

    def _decide(self) -> None:
        variance = self._square - self._lead**2 / self._steps
        best = int(np.argmax(self._lead))
        lead = self._lead[best]
        if lead <= 0 or lead * lead < EVIDENCE**2 * variance[best]:
            return
        apart = self._shadows[best].resident & ~self._shadows[self._ruler].resident
        if lead > COST * np.count_nonzero(apart):
            self._next_ruler = best
            self._steps = 0.0
            self._lead[...] = 0.0
            self._square[...] = 0.0
