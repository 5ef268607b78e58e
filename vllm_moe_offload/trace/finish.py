"""Makes a routing trace (``trace/routing.py``) of what a server spooled (``trace/spool.py``)."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from vllm_moe_offload.files import FileInUse, FileLock, remove_unfinished, replacing
from vllm_moe_offload.trace.routing import TraceError
from vllm_moe_offload.trace.spool import (
    ENDS,
    IDS,
    ROW,
    ROWS,
    SERVER,
    VERIFIED,
    Server,
    remove_spool,
    spool_of,
)

_npy: Any = np.lib.format  # untyped in numpy's stubs
BLOCK_TOKENS = 4096


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
        server = Server.model_validate_json((directory / SERVER).read_bytes())
    except ValidationError as error:
        raise TraceError(f"{directory / SERVER} is damaged; the recording is lost") from error
    row_ids_bytes = server.row_bytes - ROW.itemsize
    num_rows = min(
        (directory / ROWS).stat().st_size // ROW.itemsize,
        (directory / IDS).stat().st_size // row_ids_bytes,
    )
    rows = np.fromfile(directory / ROWS, ROW, num_rows)
    # A request has a row or an end, or there are none of it.
    ends = _pairs(directory / ENDS)
    requests = rows["request"]
    if rows.size and not 0 <= requests.min() <= requests.max() < num_rows + len(ends):
        raise TraceError(f"{directory / ROWS} is damaged; the recording is lost")
    ids: npt.NDArray[Any] = np.zeros((0, *server.row_shape), server.id_type)
    if num_rows:
        ids = np.memmap(
            directory / IDS, server.id_type, mode="r", shape=(num_rows, *server.row_shape)
        )
    return _Spooled(
        server=server,
        rows=rows,
        ids=ids,
        verified=_pairs(directory / VERIFIED),
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
