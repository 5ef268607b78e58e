"""Routing traces on disk: which experts every token of every request was routed to.

An ``.npz`` of plain arrays (never pickled). Required:

========================  ==============================================================
``ids``                   uint8/uint16 ``[tokens, layers, top_k]``: each request's positions
                          once, in order, one request after the other
``starts``, ``lens``      int64 ``[requests]``: rows of ``ids`` that belong to a request
``num_experts``           int, routed experts per layer
========================  ==============================================================

Optional: ``names`` (unicode ``[requests]``), ``prefill_lens`` (int64 ``[requests]``, how many
of a request's first tokens were prompt), ``weights`` (float16, shaped like ``ids``).

A trace recorded while serving also carries its schedule, so that a replay can count what the
server counted. One entry per token row that the server computed, in the order of its batches:

========================  ==============================================================
``row_step``              int64 ``[rows]``, ascending: number of the step
``row_request``           int32 ``[rows]``: index into ``starts``
``row_position``          int64 ``[rows]``: position of the token in its request
``row_token``             int64 ``[rows]``: row of ``ids``; ``ids.shape[0] + i`` stands for
                          row i of ``recomputed_ids``
``recomputed_ids``        like ``ids``: what was computed and belongs to no request's tokens:
                          positions computed again (after a preemption), which may route
                          differently, and tokens that a drafter guessed wrong
``row_is_draft``          bool ``[rows]``, optional: a drafter guessed the row's token; whether
                          it was right showed after the step
``first_positions``       int64 ``[requests]``: position of a request's first row of ``ids``
                          (above 0 where a prefix was cached)
``end_steps``             int64 ``[requests]``: the request ended before this step; -1 never
``layer_ids``             int64 ``[layers]``: index of each MoE layer in the model
``slots, staging_slots``  int: sizes of the server's cache
``own_experts``           int64 ``[own]``, optional: the experts that this cache is for, by their
                          place in it; the others were other workers' (expert parallelism)
========================  ==============================================================
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.native import NO_EXPERT

Ids = npt.NDArray[np.integer[Any]]
Int64s = npt.NDArray[np.int64]

REQUIRED = ("ids", "starts", "lens", "num_experts")
SCHEDULE = (
    "row_step",
    "row_request",
    "row_position",
    "row_token",
    "recomputed_ids",
    "first_positions",
    "end_steps",
    "layer_ids",
    "slots",
    "staging_slots",
)


class TraceError(ValueError):
    """A routing trace that cannot be read or contradicts itself."""


@dataclass(frozen=True, slots=True)
class RecordedSchedule:
    """In which steps a server computed which tokens; see the module's table."""

    row_step: Int64s
    row_request: npt.NDArray[np.int32]
    row_position: Int64s
    row_token: Int64s
    recomputed_ids: Ids
    first_positions: Int64s
    end_steps: Int64s
    layer_ids: Int64s
    slots: int
    staging_slots: int
    own_experts: Int64s | None = None
    row_is_draft: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True)
class RoutingTrace:
    """A routing trace in memory; the arrays are those of the module's tables."""

    ids: Ids
    starts: Int64s
    lens: Int64s
    num_experts: int
    names: list[str] = field(default_factory=list)
    prefill_lens: Int64s | None = None
    weights: npt.NDArray[np.float16] | None = None
    schedule: RecordedSchedule | None = None

    @property
    def routed(self) -> Ids:
        """What ``row_token`` counts in: :attr:`ids`, then what was computed again."""
        if self.schedule is None or not self.schedule.recomputed_ids.size:
            return self.ids
        return np.concatenate([self.ids, self.schedule.recomputed_ids])

    def as_recorded(self) -> RoutingTrace:
        """What the worker that recorded the schedule served: of its own experts, by their places.

        Ids of other workers' experts are ``native.NO_EXPERT``. The trace itself, if it had all.
        """
        schedule = self.schedule
        if schedule is None or schedule.own_experts is None:
            return self
        own = schedule.own_experts
        place = np.full(self.num_experts, NO_EXPERT, np.int32)
        place[own] = np.arange(own.size)
        again = replace(schedule, recomputed_ids=place[schedule.recomputed_ids])
        return replace(self, ids=place[self.ids], num_experts=own.size, schedule=again)

    @property
    def num_requests(self) -> int:
        """Requests in the trace."""
        return int(self.starts.size)

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return int(self.ids.shape[1])

    @property
    def top_k(self) -> int:
        """Experts per token and layer."""
        return int(self.ids.shape[2])


def id_dtype(num_experts: int) -> type[np.uint8] | type[np.uint16]:
    """Smallest dtype of the format that holds expert ids below ``num_experts``."""
    return np.uint8 if num_experts <= 256 else np.uint16


def load_trace(path: str | Path) -> RoutingTrace:
    """Reads and checks a routing trace.

    Raises:
        TraceError: not a routing trace, or arrays that contradict each other.
        OSError: the file cannot be read.
    """
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise TraceError(f"{path} is a single array, not an .npz routing trace")
        with archive:
            arrays = {name: archive[name] for name in archive.files}
    except TraceError:
        raise
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise TraceError(f"{path} is not an .npz routing trace: {error}") from error
    missing = [name for name in REQUIRED if name not in arrays]
    if missing:
        raise TraceError(f"{path} is not a routing trace: it lacks {', '.join(missing)}")
    ids, starts, lens = arrays["ids"], arrays["starts"], arrays["lens"]
    _require(path, ids.ndim == 3, f"ids must have shape [tokens, layers, k], has {ids.shape}")
    _require(path, ids.dtype.kind in "ui", f"ids must be unsigned integers, are {ids.dtype}")
    _require(
        path,
        starts.ndim == 1 and starts.shape == lens.shape,
        f"starts {starts.shape} and lens {lens.shape} must be vectors of equal length",
    )
    num_experts = int(arrays["num_experts"])
    _require(
        path,
        ids.size == 0 or (int(ids.min()) >= 0 and int(ids.max()) < num_experts),
        f"ids must lie in [0, num_experts = {num_experts})",
    )
    _require(
        path,
        bool(np.all((starts >= 0) & (lens >= 0) & (starts + lens <= ids.shape[0]))),
        f"a request lies outside the {ids.shape[0]} tokens",
    )
    prefill_lens = arrays.get("prefill_lens")
    return RoutingTrace(
        ids=ids,
        starts=starts.astype(np.int64),
        lens=lens.astype(np.int64),
        num_experts=num_experts,
        names=[str(name) for name in arrays.get("names", ())],
        prefill_lens=None if prefill_lens is None else prefill_lens.astype(np.int64),
        weights=arrays.get("weights"),
        schedule=_schedule(path, arrays),
    )


def _schedule(path: str | Path, arrays: dict[str, npt.NDArray[Any]]) -> RecordedSchedule | None:
    present = [name for name in SCHEDULE if name in arrays]
    if not present:
        return None
    missing = [name for name in SCHEDULE if name not in arrays]
    _require(path, not missing, f"its schedule lacks {', '.join(missing)}")
    num_rows = arrays["row_step"].size
    is_draft = arrays.get("row_is_draft")
    for name in ("row_request", "row_position", "row_token", "row_is_draft"):
        if name in arrays:
            _require(
                path,
                arrays[name].shape == (num_rows,),
                f"{name} must have {num_rows} entries like row_step, has {arrays[name].shape}",
            )
    steps, tokens = arrays["row_step"], arrays["row_token"]
    known = arrays["ids"].shape[0] + arrays["recomputed_ids"].shape[0]
    _require(path, bool(np.all(np.diff(steps) >= 0)), "row_step must be ascending")
    _require(
        path,
        num_rows == 0 or (int(tokens.min()) >= 0 and int(tokens.max()) < known),
        f"row_token must lie in [0, {known})",
    )
    return RecordedSchedule(
        row_step=steps,
        row_request=arrays["row_request"],
        row_position=arrays["row_position"],
        row_token=tokens,
        recomputed_ids=arrays["recomputed_ids"],
        first_positions=arrays["first_positions"],
        end_steps=arrays["end_steps"],
        layer_ids=arrays["layer_ids"],
        slots=int(arrays["slots"]),
        staging_slots=int(arrays["staging_slots"]),
        own_experts=_own_experts(path, arrays),
        row_is_draft=None if is_draft is None else is_draft.astype(np.bool_),
    )


def _own_experts(path: str | Path, arrays: dict[str, npt.NDArray[Any]]) -> Int64s | None:
    own = arrays.get("own_experts")
    if own is None:
        return None
    num_experts = int(arrays["num_experts"])
    _require(
        path,
        own.ndim == 1 and own.dtype.kind in "ui" and 0 < own.size == np.unique(own).size,
        "own_experts must be a vector of different integers",
    )
    _require(
        path,
        int(own.min()) >= 0 and int(own.max()) < num_experts,
        f"own_experts must lie in [0, num_experts = {num_experts})",
    )
    return own.astype(np.int64)


def _require(path: str | Path, condition: bool, message: str) -> None:
    if not condition:
        raise TraceError(f"{path}: {message}")
