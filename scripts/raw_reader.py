"""Plain `preadv` by C threads (raw_reader.c): what reads are measured against."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from vllm_moe_offload.cache.layout import round_up

SOURCE = Path(__file__).with_name("raw_reader.c")
MAX_THREADS = 64
"""As many as raw_reader.c has room for."""


class Part(ctypes.Structure):
    """Bytes of a file and where they go; all aligned."""

    _fields_ = (
        ("offset", ctypes.c_long),
        ("target", ctypes.c_void_p),
        ("length", ctypes.c_long),
    )


def _compile(directory: Path) -> ctypes.CDLL:
    directory.mkdir(parents=True, exist_ok=True)
    library = directory / "raw_reader.so"
    compiler = os.environ.get("CC", "cc")
    flags = ["-O2", "-shared", "-fPIC", "-pthread"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.raw_open.restype = ctypes.c_void_p
    loaded.raw_open.argtypes = [ctypes.c_int, ctypes.c_int]
    loaded.raw_read.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long]
    loaded.raw_close.restype = None
    loaded.raw_close.argtypes = [ctypes.c_void_p]
    return loaded


class RawReader:
    """C threads that preadv from one file opened with O_DIRECT; a context manager."""

    def __init__(self, path: Path, num_threads: int, directory: Path) -> None:
        """``directory``: for the compiled code. Raises OSError without O_DIRECT or compiler."""
        if not 1 <= num_threads <= MAX_THREADS:
            raise ValueError(f"{num_threads} threads; 1 to {MAX_THREADS} are possible")
        self._core = _compile(directory)
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        self._raw = self._core.raw_open(self._descriptor, num_threads)

    def __enter__(self) -> RawReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._core.raw_close(self._raw)
        os.close(self._descriptor)

    def read(self, parts: ctypes.Array[Part]) -> None:
        """Reads all and returns when all are there. Raises OSError."""
        error = self._core.raw_read(self._raw, parts, len(parts))
        if error:
            raise OSError(error, os.strerror(error))


def split_evenly(part: Part, count: int) -> Iterator[Part]:
    """``part`` in ``count`` aligned pieces of about the same size."""
    size = round_up(-(-part.length // count))
    for begin in range(0, part.length, size):
        length = min(size, part.length - begin)
        yield Part(part.offset + begin, part.target + begin, length)
