"""Which part of the model a worker has: a stage, a slice, some of the experts."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

_WHOLE = "whole"
NAME_PATTERN = re.compile(rf"{_WHOLE}|(?:(?:^|-)(?:pp|tp|ep)\d+of\d+)+")
"""What :attr:`Rank.name` looks like."""


class Rank(BaseModel):
    """A worker's place in the model's layout.

    Two workers of one server differ in at least one of the three, so what is named by
    :attr:`name` is never written by both.

    Attributes:
        pp, pp_size: pipeline stage: which layers.
        tp, tp_size: slice of every expert. With expert parallelism experts are not sliced: 0 of 1.
        ep, ep_size: which experts of a layer; 0 of 1 without expert parallelism.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pp: NonNegativeInt = 0
    pp_size: PositiveInt = 1
    tp: NonNegativeInt = 0
    tp_size: PositiveInt = 1
    ep: NonNegativeInt = 0
    ep_size: PositiveInt = 1

    @property
    def name(self) -> str:
        """``pp0of2-tp1of2``, without the kinds of parallelism that are not used; or ``whole``."""
        parts = [
            f"{kind}{place}of{size}"
            for kind, place, size in (
                ("pp", self.pp, self.pp_size),
                ("tp", self.tp, self.tp_size),
                ("ep", self.ep, self.ep_size),
            )
            if size > 1
        ]
        return "-".join(parts) or _WHOLE

    @property
    def num_parts(self) -> int:
        """Parts that the model's experts are divided in, each with a store of its own."""
        return self.pp_size * self.tp_size * self.ep_size

    @property
    def is_first(self) -> bool:
        """Whether this is the one of all workers that says what is true of all."""
        return self.pp == self.tp == self.ep == 0

    @property
    def sees_all(self) -> bool:
        """Whether the worker sees the routing of all experts of all layers."""
        return self.pp_size == self.ep_size == 1

    def trace_file(self, path: Path, *, first_slice: int = 0) -> Path:
        """Where what this worker sees of the routing is kept.

        ``path``, or for a part of the model ``path`` with the part before its suffix,
        ``traces.pp0of2.npz``. Slices of the same experts are routed to alike, so one of them keeps
        it for all.

        Args:
            path: of a worker that sees everything.
            first_slice: which slice that is. On another machine than slice 0 the first one there:
                files are not shared.
        """
        size = self.tp_size if first_slice else 1
        seen = self.model_copy(update={"tp": first_slice, "tp_size": size})
        if seen.num_parts == 1:
            return path
        return path.with_name(f"{path.stem}.{seen.name}{path.suffix}")
