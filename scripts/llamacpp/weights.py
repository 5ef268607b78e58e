"""GGUF files of a checkpoint: written by llama.cpp's own tools, and counted."""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rich.console import Console

from scripts.llamacpp.install import LlamaCpp, LlamaCppError, run_step

BF16, Q4_0 = "bf16", "q4_0"
QUANTISE = Path(__file__).with_name("quantise.py")
EXPERTS = "_exps."
"""In the names of all tensors that hold experts, and of no other."""

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a metadata value, by GGUF's number of its type."""
_STRING, _ARRAY = 8, 9


def ensure_gguf(llamacpp: LlamaCpp, model: Path, kind: str) -> Path:
    """The GGUF file of a checkpoint beside it, written if it is missing.

    Args:
        llamacpp: whose tools write it.
        model: directory of the checkpoint.
        kind: :data:`BF16` or :data:`Q4_0`, which is made of the former.

    Raises:
        LlamaCppError: converting or quantising failed.
    """
    file = model.with_name(f"{model.name}-{kind}.gguf")
    if file.exists():
        return file
    Console().print(f"Writing {file.name}")
    unfinished = file.with_suffix(".tmp")
    if kind == BF16:
        script = str(llamacpp.vendored / "convert_hf_to_gguf.py")
        options = ["--outtype", BF16, "--outfile", str(unfinished)]
        command = [sys.executable, script, str(model), *options]
    else:
        source = ensure_gguf(llamacpp, model, BF16)
        command = [str(llamacpp.python), str(QUANTISE), str(source), str(unfinished)]
    run_step(f"writing {file.name}", command, file.with_suffix(".log"))
    unfinished.rename(file)
    return file


@dataclass(frozen=True, slots=True)
class GgufSizes:
    """What a GGUF file is made of.

    Attributes:
        file_bytes: in all.
        expert_bytes: of the tensors that hold experts.
    """

    file_bytes: int
    expert_bytes: int

    @property
    def other_bytes(self) -> int:
        """Everything else: dense weights, the tokenizer, the header."""
        return self.file_bytes - self.expert_bytes


def sizes_of(file: Path) -> GgufSizes:
    """Sizes of a GGUF file, from its header.

    Raises:
        LlamaCppError: it is no GGUF file of version 2 or 3, or has no experts.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        try:
            offsets, data_begin = _read_header(stream, file)
        except (struct.error, KeyError) as error:
            raise LlamaCppError(f"{file} is damaged: {error!r} in its header") from error
    # Tensors lie one after the other, so each ends where the next begins.
    ordered = sorted(offsets.items(), key=lambda item: item[1])
    ends = [offset for _, offset in ordered[1:]] + [size - data_begin]
    experts = sum(
        end - offset
        for (name, offset), end in zip(ordered, ends, strict=True)
        if EXPERTS in name
    )
    if experts == 0:
        raise LlamaCppError(f"{file} holds no experts: no tensor has {EXPERTS!r} in its name")
    return GgufSizes(size, experts)


def _read_header(stream: BinaryIO, file: Path) -> tuple[dict[str, int], int]:
    """Offset of each tensor in the data, and where the data begins in the file."""
    magic, version = struct.unpack("<4sI", stream.read(8))
    if magic != b"GGUF" or version not in (2, 3):
        raise LlamaCppError(
            f"{file} begins with {magic!r}, version {version}; GGUF 2 or 3 is read"
        )
    tensors, values = struct.unpack("<QQ", stream.read(16))
    alignment = 32
    for _ in range(values):
        key = _string(stream)
        kind = _number(stream, "I")
        if key == "general.alignment":
            alignment = _number(stream, "I")
        else:
            _skip(stream, kind)
    offsets = {}
    for _ in range(tensors):
        name = _string(stream)
        dimensions = _number(stream, "I")
        stream.read(8 * dimensions + 4)  # the shape and the element type
        offsets[name] = _number(stream, "Q")
    return offsets, -(-stream.tell() // alignment) * alignment


def _number(stream: BinaryIO, code: str) -> int:
    value: int = struct.unpack(f"<{code}", stream.read(struct.calcsize(code)))[0]
    return value


def _string(stream: BinaryIO) -> str:
    return stream.read(_number(stream, "Q")).decode(errors="replace")


def _skip(stream: BinaryIO, kind: int) -> None:
    """Reads past a metadata value."""
    if kind == _STRING:
        _string(stream)
    elif kind == _ARRAY:
        inner, count = _number(stream, "I"), _number(stream, "Q")
        if inner in _SIZES:
            stream.read(_SIZES[inner] * count)
        else:
            for _ in range(count):
                _skip(stream, inner)
    else:
        stream.read(_SIZES[kind])
