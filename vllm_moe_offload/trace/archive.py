"""Reads the arrays of an ``.npz`` that anybody may have made: what is said of them, then they.

A file of a few megabytes may say that it holds terabytes. So the headers of all arrays are read
first, and an array only once whoever asks for it has seen what it is to be.
"""

from __future__ import annotations

import contextlib
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.cache.headroom import host_headroom
from vllm_moe_offload.files import open_regular

_npy: Any = np.lib.format  # untyped in numpy's stubs
_SUFFIX = ".npy"
_HEADERS = {(1, 0): _npy.read_array_header_1_0, (2, 0): _npy.read_array_header_2_0}
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
MOST_PACKED = 100
"""Bytes in memory for a byte in the file. Deflate packs a thousand of what is always the same."""
ALWAYS_READ_BYTES = 64 << 20
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    MemoryError,
    NotImplementedError,  # zip features that nobody writes traces with
    OverflowError,
    RuntimeError,  # encrypted
    ValueError,
    # A header is a Python literal, and numpy retries those that are none as Python 2's:
    SyntaxError,
    TypeError,
    tokenize.TokenError,
)
"""What is raised for files that are damaged, by those who read zip, deflate and npy."""


class ArchiveError(ValueError):
    """A file that is no ``.npz`` of plain arrays; the message says why, without the file's name."""


@dataclass(frozen=True, slots=True)
class ArrayHeader:
    """What a file says of one of its arrays.

    Attributes:
        dtype: of its elements; never of Python objects.
        shape: its lengths.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of the array in memory."""
        return math.prod(self.shape) * self.dtype.itemsize


class Archive:
    """An open ``.npz``.

    Attributes:
        headers: of all its arrays, by name.
    """

    def __init__(self, zipped: zipfile.ZipFile, file_bytes: int) -> None:
        """Raises ArchiveError, or what :data:`_DAMAGE` has, for what is no ``.npz``."""
        self._zip = zipped
        self._file_bytes = file_bytes
        self._members = {
            member.filename.removesuffix(_SUFFIX): member
            for member in zipped.infolist()
            if member.filename.endswith(_SUFFIX)
        }
        for member in self._members.values():
            if not 0 <= member.header_offset < file_bytes:
                raise ArchiveError(f"{member.filename} lies outside the file")
            if member.compress_type not in _METHODS:
                raise ArchiveError(
                    f"{member.filename} is compressed in another way than numpy's"
                )
        self.headers = {name: self._header(name) for name in self._members}

    def _header(self, name: str) -> ArrayHeader:
        member = self._members[name]
        with self._zip.open(member) as file:
            version = _npy.read_magic(file)
            if version not in _HEADERS:
                raise ArchiveError(f"{member.filename} is of an npy version unknown here")
            shape, _, dtype = _HEADERS[version](file)
            header_bytes = file.tell()
        if dtype.hasobject:
            raise ArchiveError(f"{name} holds Python objects, which are never read")
        header = ArrayHeader(dtype, shape)
        data_bytes = member.file_size - header_bytes
        # Elements without bytes could be any number.
        if not dtype.itemsize or min(shape, default=0) < 0 or header.nbytes != data_bytes:
            raise ArchiveError(
                f"{name} says that it is {dtype} {list(shape)}, and has {data_bytes} bytes"
            )
        return header

    def check_memory(self, names: Iterable[str]) -> None:
        """Raises ArchiveError if these arrays would take more memory than they may: half of what is
        available, and no more for the file's size than what was recorded can be packed."""
        nbytes = sum(self.headers[name].nbytes for name in names)
        available = host_headroom().available_bytes
        if nbytes > available // 2:
            raise ArchiveError(
                f"its arrays take {nbytes} bytes of memory, half of what is available at most is "
                f"read: {available // 2}"
            )
        if nbytes > max(MOST_PACKED * self._file_bytes, ALWAYS_READ_BYTES):
            raise ArchiveError(
                f"its arrays take {nbytes} bytes of memory, and no routing is packed in "
                f"{self._file_bytes} bytes of that"
            )

    def read(self, name: str) -> npt.NDArray[Any]:
        """One of the arrays.

        Raises:
            ArchiveError: it is damaged.
            OSError: the file cannot be read.
        """
        with _named(name), self._zip.open(self._members[name]) as file:
            return np.asarray(_npy.read_array(file, allow_pickle=False))


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[Archive]:
    """An ``.npz`` file, to be read.

    Raises:
        ArchiveError: it is none.
        OSError: it cannot be read.
    """
    with open_regular(Path(path)) as file:
        with _named(None):
            archive = Archive(zipfile.ZipFile(file), _nbytes(file))
        yield archive


def _nbytes(file: IO[bytes]) -> int:
    return file.seek(0, 2)


@contextlib.contextmanager
def _named(name: str | None) -> Iterator[None]:
    """Gives damage one kind of error, and one line."""
    try:
        yield
    except ArchiveError:
        raise
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ArchiveError(reason if name is None else f"{name}: {reason}") from error
