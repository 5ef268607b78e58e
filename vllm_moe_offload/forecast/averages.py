"""Exponential averages of what each running request used, and their sums over requests.

Fading a whole table per step would cost as much as everything else together in a large model,
where a step uses a few experts of many: tables are kept divided by a scale of their own, which
fades instead of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.native import NO_EXPERT
from vllm_moe_offload.step import FloatArray, StepTokens

SMALLEST_SCALE = 2.0**-60
"""Scale at which a request's averages are multiplied out, far from where float32 loses digits."""
SMALLEST_TABLE_SCALE = 2.0**-20
"""The same for a table; products of two are added up in float32 (``forecast/mixture.py``)."""


@dataclass(frozen=True, slots=True)
class StepUses:
    """Every (token, expert) pair of a step.

    Attributes:
        keys: int64 ``[pairs]``, ``layer * num_experts + expert``.
        owner: int64 ``[pairs]``, running request (its index) of each pair.
        age: int64 ``[pairs]``, later tokens of the same request in the step.
        indices: int64 ``[requests]``, those of the running requests in the step.
        lengths: int64 ``[requests]``, tokens that each of them computes.
    """

    keys: npt.NDArray[np.int64]
    owner: npt.NDArray[np.int64]
    age: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]

    @classmethod
    def of_step(
        cls,
        ids: npt.NDArray[np.int32],
        tokens: StepTokens,
        running: npt.NDArray[np.int64],
        num_experts: int,
    ) -> StepUses:
        """Uses in ``ids`` ``[layers, tokens, top_k]``, which ``native.NO_EXPERT`` is none of;
        ``running`` are the indices of its requests."""
        layers, count, top_k = ids.shape
        lengths = np.bincount(tokens.request_of_token, minlength=len(tokens.requests))
        offsets = np.arange(layers, dtype=np.int64) * num_experts
        keys = (ids + offsets[:, None, None]).reshape(-1)
        of_row = np.empty((2, layers, count, top_k), np.int64)  # faster than broadcast_to
        of_row[0] = running[tokens.request_of_token][:, None]
        of_row[1] = (np.cumsum(lengths)[tokens.request_of_token] - 1 - np.arange(count))[
            :, None
        ]
        owner, age = of_row.reshape(2, -1)
        is_use = (ids != NO_EXPERT).reshape(-1)
        if not is_use.all():
            keys, owner, age = keys[is_use], owner[is_use], age[is_use]
        return cls(keys, owner, age, running, lengths)

    def rounds(self, in_one: npt.NDArray[np.bool_]) -> Iterator[StepUses]:
        """The same uses as if every request had computed one token at a time, in order.

        ``in_one``: bool ``[requests]``, of those in :attr:`indices`, who takes all its tokens at
        once (a prompt), in the last round.
        """
        longest = int(self.lengths[~in_one].max(initial=1))
        if longest == 1:
            yield self
            return
        is_at_once = np.zeros(int(self.indices.max()) + 1, np.bool_)
        is_at_once[self.indices[in_one]] = True
        at_once = is_at_once[self.owner]
        for later in range(longest - 1, -1, -1):  # tokens that follow
            runs = ~in_one & (self.lengths > later)
            is_now = ~at_once & (self.age == later)
            if not later:
                runs |= in_one
                is_now |= at_once
            yield StepUses(
                self.keys[is_now],
                self.owner[is_now],
                np.where(at_once[is_now], self.age[is_now], 0),
                self.indices[runs],
                np.where(in_one[runs], self.lengths[runs], 1),
            )

    @property
    def one_token_each(self) -> bool:
        """Whether every request computes exactly one token."""
        return bool((self.lengths == 1).all())


def _add_at(tables: FloatArray, keys: npt.NDArray[np.int64], values: FloatArray) -> None:
    """Adds ``values`` ``[tables, keys]`` to each of the contiguous ``tables`` at ``keys``."""
    offsets = np.arange(len(tables))[:, None] * (tables.size // len(tables))
    np.add.at(tables.reshape(-1), (offsets + keys).reshape(-1), values.reshape(-1))


class FadingTables:
    """Tables that fade by a factor and gain at some places; both cost what the places cost.

    Attributes:
        stored: float32 ``[tables, size]``, contiguous; what they hold divided by their scale.
        scale: float64 ``[tables]``.
    """

    def __init__(self, stored: FloatArray) -> None:
        self.stored = stored
        self.scale: npt.NDArray[np.float64] = np.ones(len(stored))

    @property
    def values(self) -> npt.NDArray[np.float64]:
        """float64 ``[tables, size]``, what the tables hold; a new array."""
        return self.scale[:, None] * self.stored

    def fade(self, keep: npt.NDArray[np.float64]) -> None:
        """Multiplies each table by its ``keep``."""
        self.scale *= keep
        for index in np.flatnonzero(self.scale < SMALLEST_TABLE_SCALE):
            self.stored[index] *= np.float32(self.scale[index])
            self.scale[index] = 1.0

    def add(self, keys: npt.NDArray[np.int64], values: npt.NDArray[np.floating[Any]]) -> None:
        """Adds ``values`` ``[tables, keys]`` (or what is broadcast to it); keys may repeat."""
        stored: FloatArray = np.empty((len(self.stored), keys.size), np.float32)
        stored[...] = values / self.scale[:, None]
        _add_at(self.stored, keys, stored)


class UseAverages:
    """Averages of several half-lives at once.

    Attributes:
        totals: tables ``[averages, size]``, the sums over the running requests.
        decay: float64 ``[averages]``, factor per token.
        weight: float64 ``[averages, requests]``, what an expert of every token would have by now:
            an average over few tokens has not reached its level yet.
    """

    def __init__(self, half_lives: tuple[float, ...], totals: FloatArray) -> None:
        """``totals``: ``[averages, size]``, memory of the attribute of that name."""
        self.decay = 2.0 ** (-1.0 / np.array(half_lives))
        count, size = totals.shape
        self.totals = FadingTables(totals)
        self._are_totals_current = True
        self._scaled: FloatArray = np.zeros((count, 8, size), np.float32)
        self._scale: npt.NDArray[np.float64] = np.ones((count, 8))
        self.weight: npt.NDArray[np.float64] = np.zeros((count, 8))

    def add(self, index: int) -> None:
        """A request without any use takes ``index``."""
        if index == self.weight.shape[1]:
            for name in ("_scaled", "_scale", "weight"):
                array = getattr(self, name)
                setattr(self, name, np.concatenate([array, array], axis=1))
        self._scaled[:, index] = 0.0
        self._scale[:, index] = 1.0
        self.weight[:, index] = 0.0

    def move(self, source: int, target: int) -> None:
        """The request of index ``target`` ended; that of ``source`` takes its index."""
        self._are_totals_current = False
        if source != target:
            for array in (self._scaled, self._scale, self.weight):
                array[:, target] = array[:, source]

    def take_in(self, uses: StepUses, running: int) -> None:
        """Moves the averages on by a step; ``running``: requests there are."""
        indices, lengths = uses.indices, uses.lengths
        single = uses.one_token_each
        keep = self.decay[:, None] ** lengths
        self._scale[:, indices] *= keep
        many = indices[lengths > 1]
        if many.size:  # a prompt may fade everything before it to nothing
            self._multiply_out(many)
        self.weight[:, indices] = 1.0 - (1.0 - self.weight[:, indices]) * keep
        gained = 1.0 - self.decay[:, None]
        gain = (gained / self._scale).astype(np.float32)[:, uses.owner]
        if not single:
            gain *= (self.decay[:, None] ** uses.age).astype(np.float32)
        _add_at(self._scaled, uses.owner * self._scaled.shape[2] + uses.keys, gain)
        if single and indices.size == running and self._are_totals_current:
            self.totals.fade(self.decay)
            self.totals.add(uses.keys, gained)
        else:
            self._are_totals_current = False
        faded = (self._scale[:, indices] < SMALLEST_SCALE).any(axis=0)
        if faded.any():
            self._multiply_out(indices[faded])

    def _multiply_out(self, indices: npt.NDArray[np.int64]) -> None:
        self._scaled[:, indices] *= self._scale[:, indices, None].astype(np.float32)
        self._scale[:, indices] = 1.0

    def refresh_totals(self, running: int) -> None:
        """Adds the sums up afresh where requests came, went or paused."""
        if self._are_totals_current:
            return
        scale = self._scale[:, :running].astype(np.float32)
        np.einsum("ar,ars->as", scale, self._scaled[:, :running], out=self.totals.stored)
        self.totals.scale[...] = 1.0
        self._are_totals_current = True
