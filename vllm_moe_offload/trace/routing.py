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

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.native import NO_EXPERT
from vllm_moe_offload.trace.archive import Archive, ArchiveError, opened
from vllm_moe_offload.trace.shape import MAX_EXPERTS, shape_fault

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
    """Reads and checks a routing trace; anybody may have made it.

    Raises:
        TraceError: not a routing trace, or arrays that contradict each other.
        OSError: the file cannot be read.
    """
    try:
        with opened(path) as archive:
            _check_headers(archive)
            names = [name for name in archive.headers if name in _FIELDS]
            archive.check_memory(names)
            arrays = {name: archive.read(name) for name in names}
        _check_requests(arrays)
        if SCHEDULE[0] in arrays:
            _check_schedule(arrays)
    except ArchiveError as error:
        raise TraceError(f"{path} is not an .npz routing trace: {error}") from error
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from error
    prefill_lens = arrays.get("prefill_lens")
    return RoutingTrace(
        ids=arrays["ids"],
        starts=arrays["starts"].astype(np.int64),
        lens=arrays["lens"].astype(np.int64),
        num_experts=int(arrays["num_experts"]),
        names=[str(name) for name in arrays.get("names", ())],
        prefill_lens=None if prefill_lens is None else prefill_lens.astype(np.int64),
        weights=arrays.get("weights"),
        schedule=_schedule(arrays) if SCHEDULE[0] in arrays else None,
    )


def _schedule(arrays: Arrays) -> RecordedSchedule:
    own = arrays.get("own_experts")
    return RecordedSchedule(
        row_step=arrays["row_step"].astype(np.int64),
        row_request=arrays["row_request"].astype(np.int32),
        row_position=arrays["row_position"].astype(np.int64),
        row_token=arrays["row_token"].astype(np.int64),
        recomputed_ids=arrays["recomputed_ids"],
        first_positions=arrays["first_positions"].astype(np.int64),
        end_steps=arrays["end_steps"].astype(np.int64),
        layer_ids=arrays["layer_ids"].astype(np.int64),
        slots=int(arrays["slots"]),
        staging_slots=int(arrays["staging_slots"]),
        own_experts=None if own is None else own.astype(np.int64),
        row_is_draft=arrays.get("row_is_draft"),
    )


# ---- what may be in a file ------------------------------------------------------------------
# Whatever passes is used as indices, sizes and positions without another look.

Arrays = Mapping[str, npt.NDArray[Any]]

_INTEGERS = "ui"
_FIELDS = {
    "ids": ("tokens layers k", _INTEGERS),
    "starts": ("requests", _INTEGERS),
    "lens": ("requests", _INTEGERS),
    "num_experts": ("", _INTEGERS),
    "names": ("requests", "U"),
    "prefill_lens": ("requests", _INTEGERS),
    "weights": ("tokens layers k", "f"),
    "row_step": ("rows", _INTEGERS),
    "row_request": ("rows", _INTEGERS),
    "row_position": ("rows", _INTEGERS),
    "row_token": ("rows", _INTEGERS),
    "row_is_draft": ("rows", "b"),
    "recomputed_ids": ("recomputed layers k", _INTEGERS),
    "first_positions": ("requests", _INTEGERS),
    "end_steps": ("requests", _INTEGERS),
    "layer_ids": ("layers", _INTEGERS),
    "slots": ("", _INTEGERS),
    "staging_slots": ("", _INTEGERS),
    "own_experts": ("own", _INTEGERS),
}
"""Of every array its lengths, by name, and kinds of numbers (as numpy names them)."""
_KINDS = {_INTEGERS: "integers", "U": "text", "f": "floating point numbers", "b": "booleans"}
_MAX_NUMBER = 1 << 40
"""Of positions and steps: sums of a few of them are no more than an int64 holds."""


def _check_headers(archive: Archive) -> None:
    """Kinds and lengths of all arrays, before one is read."""
    headers = archive.headers
    missing = [name for name in REQUIRED if name not in headers]
    if missing:
        raise TraceError(f"not a routing trace: it lacks {', '.join(missing)}")
    if any(name in headers for name in SCHEDULE):
        missing = [name for name in SCHEDULE if name not in headers]
        _require(not missing, f"its schedule lacks {', '.join(missing)}")
    known: dict[str, int] = {}
    for name, (lengths, kinds) in _FIELDS.items():
        header = headers.get(name)
        if header is None:
            continue
        _require(
            header.dtype.kind in kinds, f"{name} must be {_KINDS[kinds]}, are {header.dtype}"
        )
        names = lengths.split()
        _require(
            len(header.shape) == len(names),
            f"{name} must have shape [{', '.join(names)}], has {list(header.shape)}",
        )
        for length, found in zip(names, header.shape, strict=True):
            wanted = known.setdefault(length, found)
            _require(
                found == wanted, f"{name} has {found} {length}, other arrays have {wanted}"
            )


def _check_requests(arrays: Arrays) -> None:
    num_experts, ids = int(arrays["num_experts"]), arrays["ids"]
    num_tokens, num_layers, top_k = ids.shape
    fault = shape_fault(num_layers, num_experts)
    _require(fault is None, str(fault))
    _require(
        1 <= top_k <= num_experts, f"k must lie in [1, num_experts = {num_experts}], is {top_k}"
    )
    _check_range("ids", ids, 0, num_experts, "num_experts")
    lens = arrays["lens"]
    for name in ("starts", "lens"):
        _check_range(name, arrays[name], 0, num_tokens + 1, "tokens + 1")
    starts = arrays["starts"].astype(np.int64)
    ends = starts + lens.astype(np.int64)
    _require(
        bool(np.all(ends <= num_tokens)), f"a request lies outside the {num_tokens} tokens"
    )
    _require(bool(np.all(starts[1:] >= ends[:-1])), "requests must follow each other")
    if "prefill_lens" in arrays:
        prefill = arrays["prefill_lens"]
        _require(
            bool(np.all((prefill >= 0) & (prefill <= lens))),
            "prefill_lens must lie between 0 and lens",
        )
    if "weights" in arrays:
        _require(bool(np.isfinite(arrays["weights"]).all()), "weights must be finite")


def _check_schedule(arrays: Arrays) -> None:
    num_experts, num_requests = int(arrays["num_experts"]), arrays["starts"].size
    known = arrays["ids"].shape[0] + arrays["recomputed_ids"].shape[0]
    _check_range("recomputed_ids", arrays["recomputed_ids"], 0, num_experts, "num_experts")
    _check_range("row_request", arrays["row_request"], 0, num_requests, "requests")
    _check_range("row_token", arrays["row_token"], 0, known, "ids and recomputed_ids")
    for name in ("row_step", "row_position", "first_positions", "layer_ids"):
        _check_range(name, arrays[name], 0, _MAX_NUMBER)
    _check_range("end_steps", arrays["end_steps"], -1, _MAX_NUMBER)
    # A drafter's layers, which are not in the trace, share the slots.
    _check_range("slots", arrays["slots"], 1, MAX_EXPERTS + 1)
    _check_range("staging_slots", arrays["staging_slots"], 0, MAX_EXPERTS + 1)
    if "own_experts" in arrays:
        own = arrays["own_experts"]
        _check_range("own_experts", own, 0, num_experts, "num_experts")
        _require(
            0 < own.size == np.unique(own).size, "own_experts must be different, and not none"
        )
    _check_steps(arrays)


def _check_steps(arrays: Arrays) -> None:
    """A request's tokens of a step follow each other, in their batch and by position."""
    steps, requests, positions = (
        arrays[name].astype(np.int64) for name in ("row_step", "row_request", "row_position")
    )
    _require(bool(np.all(np.diff(steps) >= 0)), "row_step must be ascending")
    goes_on = (np.diff(steps) == 0) & (np.diff(requests) == 0)
    _require(
        bool(np.all(np.diff(positions)[goes_on] == 1)),
        "row_position must ascend by 1 within a request's tokens of a step",
    )
    begins = np.flatnonzero(np.append(True, ~goes_on)[: steps.size])
    parts = np.stack([steps[begins], requests[begins]], axis=1)
    _require(
        len(np.unique(parts, axis=0)) == len(parts),
        "row_request must have a request's tokens of a step together",
    )


def _check_range(
    name: str, values: npt.NDArray[Any], low: int, end: int, what: str | None = None
) -> None:
    """Raises TraceError unless all integers lie in ``[low, end)``; ``what``: that ``end`` is."""
    if values.size and not (int(values.min()) >= low and int(values.max()) < end):
        raise TraceError(f"{name} must lie in [{low}, {f'{what} = ' if what else ''}{end})")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise TraceError(message)
