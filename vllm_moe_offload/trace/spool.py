"""What a server recorded, before it is a routing trace (``trace/routing.py``).

A directory (0700) beside the trace, ``<trace>.spool``. Everything is appended as it happens, so
what a server recorded before it was killed, or could not write its trace, can be made a trace
later (``vllm-moe-offload trace finish``):

===============  =======================================================================
``server.json``  :class:`Server`
``rows``         :data:`ROW` per token row that the server computed, in the order of its
                 batches
``ids``          ``[rows, layers, top_k]``: what each was routed to
``verified``     int64 pairs: a row, how many from there on. Guesses of a drafter that
                 turned out to be their requests'
``ends``         int64 pairs: a request that ended, the step before which it did
===============  =======================================================================
"""

from __future__ import annotations

import io
import os
import stat
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_moe_offload.files import FileInUse, FileLock, remove_unfinished, replacing
from vllm_moe_offload.trace.routing import TraceError, id_dtype
from vllm_moe_offload.trace.shape import MAX_LAYER_EXPERTS

_npy: Any = np.lib.format  # untyped in numpy's stubs
BLOCK_TOKENS = 4096
ROW = np.dtype(
    [
        ("step", "<i8"),
        ("request", "<i4"),
        ("position", "<i8"),
        ("is_again", "?"),  # its position was computed before
        ("is_draft", "?"),
        ("is_prompt", "?"),
    ]
)
_SERVER, _ROWS, _IDS, _VERIFIED, _ENDS = _FILES = (
    "server.json",
    "rows",
    "ids",
    "verified",
    "ends",
)


class Server(BaseModel):
    """What is true of all rows.

    Attributes:
        num_experts, top_k: shape of the routing.
        layer_ids: index of each MoE layer in the model.
        num_slots, num_staging_slots: of the server's cache.
        own_experts: those that the cache is for; None: all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_experts: Annotated[int, Field(ge=1, le=MAX_LAYER_EXPERTS)]
    top_k: Annotated[int, Field(ge=1)]
    layer_ids: Annotated[Sequence[int], Field(min_length=1)]
    num_slots: int
    num_staging_slots: int
    own_experts: Sequence[int] | None = None

    @property
    def id_type(self) -> np.dtype[Any]:
        """Of one expert id."""
        return np.dtype(id_dtype(self.num_experts))

    @property
    def row_shape(self) -> tuple[int, int]:
        """Layers and experts of one row's ids."""
        return len(self.layer_ids), self.top_k

    @property
    def row_bytes(self) -> int:
        """That one row takes in a spool."""
        return len(self.layer_ids) * self.top_k * self.id_type.itemsize + ROW.itemsize


def spool_of(trace: Path) -> Path:
    """Directory of what becomes ``trace``."""
    return trace.with_name(f"{trace.name}.spool")


def remove_spool(directory: Path) -> bool:
    """Removes a spool, and nothing that is none; False if nothing is there.

    Raises:
        OSError: what is there is not a directory of this process's user, or holds other files.
    """
    try:
        status = directory.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise OSError(f"{directory} is no directory of yours")
    for name in _FILES:
        (directory / name).unlink(missing_ok=True)
    directory.rmdir()
    return True


class SpoolWriter:
    """Appends to a new spool.

    Attributes:
        directory: the spool.
        num_rows: rows in it.
        nbytes: bytes of its rows, verified guesses and ends.
    """

    def __init__(self, directory: Path, server: Server) -> None:
        """Creates the directory. Raises OSError if that fails, or it is there already."""
        self.directory = directory
        self.num_rows = 0
        self.nbytes = 0
        directory.mkdir(mode=0o700)
        self._files = {
            name: io.FileIO(directory / name, "xb", opener=_private) for name in _FILES
        }
        self._append(_SERVER, server.model_dump_json().encode())

    def add_rows(self, rows: npt.NDArray[Any], ids: npt.NDArray[Any]) -> None:
        """A step's rows, :data:`ROW` ``[rows]``, and their ids ``[rows, layers, top_k]``.

        Raises:
            OSError: they cannot be written; the spool ends with the step before.
        """
        try:
            self._append(_IDS, ids.tobytes())
            self._append(_ROWS, rows.tobytes())
        except OSError:
            self._files[_ROWS].truncate(self.num_rows * ROW.itemsize)  # ids count by their rows
            raise
        self.num_rows += rows.size
        self.nbytes += ids.nbytes + rows.nbytes

    def add_verified(self, first_row: int, count: int) -> None:
        """Guesses that were right. Raises OSError."""
        self._add_pair(_VERIFIED, first_row, count)

    def add_end(self, request: int, step: int) -> None:
        """A request ended before ``step``. Raises OSError."""
        self._add_pair(_ENDS, request, step)

    def _add_pair(self, name: str, *pair: int) -> None:
        entry = np.array(pair, "<i8").tobytes()
        self._append(name, entry)
        self.nbytes += len(entry)

    def _append(self, name: str, data: bytes) -> None:
        rest = memoryview(data)
        while rest:  # a disk that is nearly full takes a part first
            rest = rest[self._files[name].write(rest) :]

    def close(self) -> None:
        """Closes the files; what they hold stays."""
        for file in self._files.values():
            file.close()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


@dataclass(frozen=True, slots=True)
class _Spooled:
    """A spool's content; ids stay on disk. Of a step that was cut short, the rows that are there."""

    server: Server
    rows: npt.NDArray[Any]
    ids: npt.NDArray[Any]
    verified: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]


def _read(directory: Path) -> _Spooled:
    try:
        server = Server.model_validate_json((directory / _SERVER).read_bytes())
    except ValidationError as error:
        raise TraceError(f"{directory / _SERVER} is damaged; the recording is lost") from error
    row_ids_bytes = server.row_bytes - ROW.itemsize
    num_rows = min(
        (directory / _ROWS).stat().st_size // ROW.itemsize,
        (directory / _IDS).stat().st_size // row_ids_bytes,
    )
    rows = np.fromfile(directory / _ROWS, ROW, num_rows)
    # A request has a row or an end, or there are none of it.
    ends = _pairs(directory / _ENDS)
    requests = rows["request"]
    if rows.size and not 0 <= requests.min() <= requests.max() < num_rows + len(ends):
        raise TraceError(f"{directory / _ROWS} is damaged; the recording is lost")
    ids: npt.NDArray[Any] = np.zeros((0, *server.row_shape), server.id_type)
    if num_rows:
        ids = np.memmap(
            directory / _IDS, server.id_type, mode="r", shape=(num_rows, *server.row_shape)
        )
    return _Spooled(
        server=server,
        rows=rows,
        ids=ids,
        verified=_pairs(directory / _VERIFIED),
        ends=ends,
    )


def _pairs(path: Path) -> npt.NDArray[np.int64]:
    numbers = np.fromfile(path, "<i8")
    return numbers[: numbers.size // 2 * 2].reshape(-1, 2)


def finish_trace(path: Path) -> tuple[int, int]:
    """Makes the trace ``path`` of the spool that a server left, and removes that.

    Returns:
        Numbers of tokens and requests.

    Raises:
        TraceError: there is none, a server is recording it, or it is damaged.
        OSError: the trace cannot be written; the spool stays.
    """
    directory = spool_of(path)
    if not directory.is_dir():
        raise TraceError(f"there is no recording {directory} to make a trace of")
    try:
        lock = FileLock(path)
    except FileInUse as error:
        raise TraceError(
            f"{directory} is being recorded: the server that does so writes {path} when it ends"
        ) from error
    try:
        remove_unfinished(path)
        counts = write_trace(directory, path)
        remove_spool(directory)
    finally:
        lock.release()
    return counts


def write_trace(directory: Path, path: Path) -> tuple[int, int]:
    """Makes the trace ``path`` of a spool, which stays; returns numbers of tokens and requests.

    Raises:
        OSError: there is no spool, or the trace cannot be written; an older one is left as it was.
        TraceError: the spool is damaged.
    """
    spooled = _read(directory)
    arrays, own, extra = _arrays(spooled)
    with (
        replacing(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, allowZip64=True) as archive,
    ):
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                _npy.write_array(member, array, allow_pickle=False)
        _write_ids(archive, "ids", spooled.ids, own)
        _write_ids(archive, "recomputed_ids", spooled.ids, extra)
    return spooled.rows.size, arrays["lens"].size


def _arrays(
    spooled: _Spooled,
) -> tuple[Mapping[str, npt.NDArray[Any]], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """All arrays but the ids; and the rows, in order, of ``ids`` and of ``recomputed_ids``."""
    server, rows = spooled.server, spooled.rows
    # A guess that nobody verified is nobody's: its request ended, or the server did.
    is_own = ~rows["is_again"] & (~rows["is_draft"] | _is_in(spooled.verified, rows.size))
    extra, own = np.flatnonzero(~is_own), np.flatnonzero(is_own)
    own = own[np.argsort(rows["request"][own], kind="stable")]  # positions ascend already
    row_token = np.empty(rows.size, np.int64)
    row_token[own] = np.arange(own.size)
    row_token[extra] = own.size + np.arange(extra.size)
    num_requests = int(rows["request"].max(initial=-1)) + 1
    lens = np.bincount(rows["request"][own], minlength=num_requests)
    is_prompt = is_own & rows["is_prompt"]
    first_positions = np.zeros(num_requests, np.int64)
    requests, first_rows = np.unique(rows["request"], return_index=True)
    first_positions[requests] = rows["position"][first_rows]
    end_steps = np.full(num_requests, -1, np.int64)
    ends = spooled.ends[(spooled.ends[:, 0] >= 0) & (spooled.ends[:, 0] < num_requests)]
    end_steps[ends[:, 0]] = ends[:, 1]
    arrays: dict[str, npt.NDArray[Any]] = {
        "starts": (np.cumsum(lens) - lens).astype(np.int64),
        "lens": lens.astype(np.int64),
        "num_experts": np.asarray(server.num_experts, np.int64),
        "prefill_lens": np.bincount(rows["request"][is_prompt], minlength=num_requests),
        "row_step": rows["step"].astype(np.int64),
        "row_request": rows["request"].astype(np.int32),
        "row_position": rows["position"].astype(np.int64),
        "row_token": row_token,
        "first_positions": first_positions,
        "end_steps": end_steps,
        "layer_ids": np.asarray(server.layer_ids, np.int64),
        "slots": np.asarray(server.num_slots, np.int64),
        "staging_slots": np.asarray(server.num_staging_slots, np.int64),
    }
    if rows["is_draft"].any():
        arrays["row_is_draft"] = np.ascontiguousarray(rows["is_draft"])
    if server.own_experts is not None:
        arrays["own_experts"] = np.asarray(server.own_experts, np.int64)
    return arrays, own, extra


def _is_in(ranges: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.bool_]:
    """Which of ``size`` numbers lie in one of the ranges ``[ranges, (first, how many)]``."""
    begins, ends = np.clip(np.cumsum(ranges, axis=1), 0, size).T
    counts = np.bincount(begins, minlength=size + 1) - np.bincount(ends, minlength=size + 1)
    return np.asarray(np.cumsum(counts)[:size] > 0)


def _write_ids(
    archive: zipfile.ZipFile,
    name: str,
    ids: npt.NDArray[Any],
    order: npt.NDArray[np.int64],
) -> None:
    """Copies rows in the given order, a block at a time."""
    header = {
        "descr": _npy.dtype_to_descr(ids.dtype),
        "fortran_order": False,
        "shape": (order.size, *ids.shape[1:]),
    }
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        _npy.write_array_header_1_0(member, header)
        for block in _blocks(order):
            member.write(ids[block].tobytes())


def _blocks(order: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    for start in range(0, order.size, BLOCK_TOKENS):
        yield order[start : start + BLOCK_TOKENS]
