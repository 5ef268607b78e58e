"""What a server recorded, before it is a routing trace (``trace/routing.py``).

A directory (0700) beside the trace, ``<trace>.spool``. Everything is appended as it happens, so
what a server recorded before it was killed, or could not write its trace, can be made a trace
later (``trace/finish.py``):

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
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from vllm_moe_offload.trace.routing import id_dtype
from vllm_moe_offload.trace.shape import MAX_LAYER_EXPERTS

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
SERVER, ROWS, IDS, VERIFIED, ENDS = FILES = ("server.json", "rows", "ids", "verified", "ends")
"""Names of the files."""


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
    for name in FILES:
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
            name: io.FileIO(directory / name, "xb", opener=_private) for name in FILES
        }
        self._append(SERVER, server.model_dump_json().encode())

    def add_rows(self, rows: npt.NDArray[Any], ids: npt.NDArray[Any]) -> None:
        """A step's rows, :data:`ROW` ``[rows]``, and their ids ``[rows, layers, top_k]``.

        Raises:
            OSError: they cannot be written; the spool ends with the step before.
        """
        try:
            self._append(IDS, ids.tobytes())
            self._append(ROWS, rows.tobytes())
        except OSError:
            self._files[ROWS].truncate(self.num_rows * ROW.itemsize)  # ids count by their rows
            raise
        self.num_rows += rows.size
        self.nbytes += ids.nbytes + rows.nbytes

    def add_verified(self, first_row: int, count: int) -> None:
        """Guesses that were right. Raises OSError."""
        self._add_pair(VERIFIED, first_row, count)

    def add_end(self, request: int, step: int) -> None:
        """A request ended before ``step``. Raises OSError."""
        self._add_pair(ENDS, request, step)

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
