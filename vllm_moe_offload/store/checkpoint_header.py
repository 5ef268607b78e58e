"""The header of a safetensors file: which tensors it holds, and where they lie.

The format's own library checks it, whose word on what is a safetensors file is the last: offsets
without gaps and overlaps, shapes and element types that give their bytes, a header of 100 MB at
most. It does not tell where tensors lie in the file, so the header is then read a second time.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

_LENGTH = struct.Struct("<Q")
"""In front of the header."""


@dataclass(frozen=True, slots=True)
class TensorRange:
    """Where a tensor lies.

    Attributes:
        path: safetensors file.
        offset: of its first byte in the file.
        nbytes: its size.
        dtype: safetensors' name of its element type.
        shape: its shape.
    """

    path: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


def tensor_ranges(path: Path) -> dict[str, TensorRange]:
    """The tensors of a safetensors file, by name; reads its header only.

    Format: https://github.com/huggingface/safetensors#format

    Raises:
        ValueError: it is not a safetensors file, or damaged; says what is wrong.
        OSError: it cannot be read.
    """
    if path.exists() and not path.is_file():  # opening a pipe would wait for its other end
        raise ValueError(f"{path} is no safetensors file, or damaged: not a regular file")
    try:
        with safe_open(path, framework="np"):
            pass
        return _ranges(path)
    except (SafetensorError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()).removeprefix("Error while deserializing header: ")
        raise ValueError(f"{path} is no safetensors file, or damaged: {reason}") from error


def _ranges(path: Path) -> dict[str, TensorRange]:
    """Of a file that :func:`safe_open` takes. It skips keys that it does not know, whatever they
    hold, which may be too much for the parser here."""
    with path.open("rb") as file:
        (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
        header = json.loads(file.read(length))
    ranges = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict):
            raise ValueError(f"what describes {name} must be an object")
        begin, end = entry["data_offsets"]
        start = _LENGTH.size + length + begin
        ranges[name] = TensorRange(
            path, start, end - begin, entry["dtype"], tuple(entry["shape"])
        )
    return ranges
