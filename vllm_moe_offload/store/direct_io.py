"""File I/O past the page cache, for building a store."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.cache.host_memory import anonymous_region
from vllm_moe_offload.cache.layout import ALIGNMENT

Bytes = npt.NDArray[np.uint8]

_BUFFER_BYTES = 8 << 20
_NUM_BUFFERS = 6
# With one, the disk idles while the thread waits for the interpreter's lock.
_WRITER_THREADS = 2


def aligned_buffer(nbytes: int) -> Bytes:
    """Zeroed page-aligned memory, in huge pages where possible, uint8 ``[nbytes]``."""
    return np.frombuffer(anonymous_region(nbytes), np.uint8)


def io_threads(count: int, name: str, cpus: Sequence[int] = ()) -> ThreadPoolExecutor:
    """Threads that may run on ``cpus``; empty: where the calling thread may."""
    return ThreadPoolExecutor(count, name, _run_on, (cpus,))


def _run_on(cpus: Sequence[int]) -> None:
    if cpus:
        os.sched_setaffinity(0, cpus)


def open_direct(path: Path, flags: int, mode: int = 0o600) -> int:
    """``os.open`` with O_DIRECT, or without where the file system refuses it.

    Raises:
        OSError: the file cannot be opened either way.
    """
    descriptor = os.open(path, flags | os.O_CLOEXEC, mode)
    # Not a flag of open(): refused, that would leave a new file behind.
    with contextlib.suppress(OSError):
        _set_direct(descriptor, True)
    return descriptor


def stop_if_refused(descriptor: int, error: OSError) -> bool:
    """Turns O_DIRECT off if it may be the reason for ``error``; whether to try again.

    Some file systems accept the flag and refuse the first transfer.
    """
    direct = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
    if error.errno != errno.EINVAL or not direct:
        return False
    _set_direct(descriptor, False)
    return True


def _set_direct(descriptor: int, direct: bool) -> None:
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    wanted = flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT
    fcntl.fcntl(descriptor, fcntl.F_SETFL, wanted)


def read_into(descriptor: int, view: memoryview, offset: int) -> int:
    """Fills ``view`` from ``offset``; returns the bytes read, fewer only at the file's end.

    ``view``, ``offset`` and length must be aligned if the file was opened directly.
    """
    total = 0
    while total < len(view):
        try:
            count = os.preadv(descriptor, [view[total:]], offset + total)
        except OSError as error:
            if stop_if_refused(descriptor, error):
                continue
            raise
        if count == 0:
            break
        total += count
    return total


class DirectWriter:
    """Writes byte streams to a new file from a few reused aligned buffers.

    Filling a buffer overlaps with writing others in background threads; memory stays at
    48 MiB whatever is written. A failed write raises its OSError from a later call,
    :meth:`finish` at the latest.
    """

    def __init__(self, path: Path, cpus: Sequence[int] = ()) -> None:
        """Creates ``path`` (0600), to be written by threads on ``cpus``.

        Raises:
            OSError: also if it exists.
        """
        self._descriptor = open_direct(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        self._buffers = [aligned_buffer(_BUFFER_BYTES) for _ in range(_NUM_BUFFERS)]
        self._writes: list[Future[None] | None] = [None] * _NUM_BUFFERS
        self._threads = io_threads(_WRITER_THREADS, "vmo-store-writer", cpus)
        self._current = 0
        self._filled_bytes = 0
        self._offset = 0

    def seek(self, offset: int) -> None:
        """The next :meth:`write` goes to ``offset``, which must be aligned."""
        self._submit()
        if offset % ALIGNMENT:
            raise ValueError(f"offset {offset} is not a multiple of {ALIGNMENT}")
        self._offset = offset

    def write(self, data: Bytes) -> None:
        """Appends ``data``, uint8 ``[n]``; it was copied when this returns."""
        begin = 0
        while begin < data.size:
            count = min(data.size - begin, _BUFFER_BYTES - self._filled_bytes)
            buffer = self._buffers[self._current]
            buffer[self._filled_bytes : self._filled_bytes + count] = data[
                begin : begin + count
            ]
            self._filled_bytes += count
            begin += count
            if self._filled_bytes == _BUFFER_BYTES:
                self._submit()

    def finish(self) -> None:
        """Writes what is buffered and waits until the device has all of it."""
        self._submit()
        for index in range(_NUM_BUFFERS):
            self._await(index)
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Ends the threads and closes the file; what was not finished may be missing."""
        self._threads.shutdown(cancel_futures=True)
        os.close(self._descriptor)

    def _submit(self) -> None:
        if not self._filled_bytes:
            return
        if self._filled_bytes % ALIGNMENT:
            raise ValueError(f"{self._filled_bytes} bytes are not a multiple of {ALIGNMENT}")
        view = self._buffers[self._current].data[: self._filled_bytes]
        self._writes[self._current] = self._threads.submit(self._write_all, view, self._offset)
        self._offset += self._filled_bytes
        self._filled_bytes = 0
        self._current = (self._current + 1) % _NUM_BUFFERS
        self._await(self._current)

    def _await(self, index: int) -> None:
        write = self._writes[index]
        self._writes[index] = None
        if write is not None:
            write.result()

    def _write_all(self, view: memoryview, offset: int) -> None:
        while view:
            try:
                written = os.pwrite(self._descriptor, view, offset)
            except OSError as error:
                if stop_if_refused(self._descriptor, error):
                    continue
                raise
            view, offset = view[written:], offset + written
