"""The native file reader through its C ABI, and reads that take their time."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.stores import aligned
from vllm_moe_offload.native import Completion, Extent, Read, check, core, last_error

BLOCK = 4096
MIB = 1 << 20
CONTENT_BYTES = 40 * MIB
PLUG_BYTES = 1024 * MIB
FILE_BYTES = CONTENT_BYTES + PLUG_BYTES
DEMAND, PREFETCH = 0, 1


@dataclass
class Request:
    tag: int
    offset: int
    parts: list[np.ndarray]
    priority: int = DEMAND


@dataclass
class Reader:
    """One native reader, closed at the end of the ``with`` block."""

    path: Path | Sequence[Path]
    direct: bool = True
    threads: int = 4
    cpus: list[int] = field(default_factory=list)
    handle: int | None = None
    # Memory must outlive the reads that go to it.
    kept: list[Request] = field(default_factory=list)

    def __enter__(self) -> Reader:
        cpus = (ctypes.c_int32 * len(self.cpus))(*self.cpus)
        paths = [self.path] if isinstance(self.path, Path) else self.path
        names = (ctypes.c_char_p * len(paths))(*map(os.fsencode, paths))
        self.handle = core.vmo_reader_open(
            names, len(paths), self.direct, self.threads, cpus, len(self.cpus)
        )
        if not self.handle:
            raise last_error()
        self.num_ended = ctypes.c_int32.from_address(core.vmo_reader_num_ended(self.handle))
        return self

    def __exit__(self, *_: object) -> None:
        core.vmo_reader_close(self.handle)

    def submit(self, *requests: Request) -> None:
        self.kept += requests
        reads = (Read * len(requests))()
        for read, request in zip(reads, requests, strict=True):
            extents = (Extent * len(request.parts))()
            for extent, part in zip(extents, request.parts, strict=True):
                extent.destination = part.ctypes.data
                extent.length = part.size
            read.offset = request.offset
            read.extents = extents
            read.num_extents = len(request.parts)
            read.priority = request.priority
            read.tag = request.tag
        check(core.vmo_reader_submit(self.handle, reads, len(requests)))

    def wait(
        self, timeout_ms: int = -1, capacity: int = 16, min_count: int = 1
    ) -> list[tuple[int, int, int]]:
        """(tag, error, bytes) of what ended."""
        ended = (Completion * capacity)()
        count = check(core.vmo_reader_wait(self.handle, ended, capacity, min_count, timeout_ms))
        return [(c.tag, c.error, c.bytes) for c in ended[:count]]

    def wait_all(self) -> list[tuple[int, int, int]]:
        ended: list[tuple[int, int, int]] = []
        while batch := self.wait():
            ended += batch
        return ended

    def promote(self, tag: int) -> int:
        return check(core.vmo_reader_promote(self.handle, tag))

    def drop(self, tag: int) -> int:
        return check(core.vmo_reader_drop(self.handle, tag))


def plug(tag: int, priority: int = DEMAND) -> Request:
    """A read that keeps one thread busy for long, from a hole and thus without a disk: what
    is queued behind it waits, however busy the machine is."""
    return Request(tag, CONTENT_BYTES, [aligned(MIB)] * (PLUG_BYTES // MIB), priority)
