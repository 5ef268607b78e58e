"""Tensors of safetensors files, read past the page cache and ahead of whoever takes them.

Building a store reads the whole checkpoint once. Mapped files, as safetensors reads them, are
paged in a little at a time while nothing else happens; here a few threads read large extents
with O_DIRECT, and the disk works while tensors are put into kernel form and written. The reader
that serves (``csrc/file_reader.h``) is made for files of whole blocks, with threads of its own;
a checkpoint's files end anywhere.
"""

from __future__ import annotations

import math
import os
import re
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_moe_offload.cache.layout import ALIGNMENT
from vllm_moe_offload.store.checkpoint_header import TensorRange
from vllm_moe_offload.store.direct_io import (
    Bytes,
    aligned_buffer,
    io_threads,
    open_direct,
    read_into,
)

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""Element types of experts' tensors, by safetensors' names."""

EXTENT_BYTES = 32 << 20
"""Neighbouring tensors are read together up to this size; a larger one alone."""
WINDOW_BYTES = 256 << 20
"""What may be read and not yet taken; an extent at least."""
_THREADS = 4
DRAFTERS = ("mtp.",)
"""How names begin of tensors that a checkpoint has for a drafter alone, beside the model's."""
_EXPERT_TENSOR = re.compile(r"\.experts\.")
_EXPERT_NUMBER = re.compile(r"\.experts\.(\d{1,9})\.")
_LAYER_NUMBER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d{1,9})\.")


def layer_number(name: str) -> int | None:
    """Decoder layer in a tensor's or module's name, None if it has none."""
    match = _LAYER_NUMBER.search(name)
    return int(match.group(1)) if match else None


def expert_layer(name: str) -> int | None:
    """Decoder layer of a routed expert's tensor, None for every other tensor.

    Drafters (multi-token prediction) number their layers behind the model's, or from 0 again in
    modules of their own (:data:`DRAFTERS`).
    """
    return layer_number(name) if _EXPERT_TENSOR.search(name) else None


def expert_number(name: str) -> int | None:
    """Which expert of its layer a routed expert's tensor is of; None: of all of them."""
    match = _EXPERT_NUMBER.search(name)
    return int(match.group(1)) if match else None


class TensorStream:
    """Reads groups of tensors in order, ahead of :meth:`next_group`.

    A context manager; leaving it stops reading.
    """

    def __init__(
        self, groups: Sequence[Sequence[tuple[str, TensorRange]]], cpus: Sequence[int] = ()
    ) -> None:
        """Opens nothing yet.

        Args:
            groups: names and ranges of tensors that are taken together.
            cpus: cores for its threads; empty: where the calling thread may run.
        """
        self._groups = deque(_extents(group) for group in groups)
        self._waiting = deque(extent for group in self._groups for extent in group)
        self._reads: deque[Future[Bytes]] = deque()
        self._buffers: list[Bytes] = []  # of EXTENT_BYTES and what alignment adds; unused
        self._ahead_bytes = 0
        self._descriptors: dict[Path, int] = {}
        self._threads = io_threads(_THREADS, "vmo-checkpoint-reader", cpus)

    def __enter__(self) -> TensorStream:
        """Begins to read."""
        self._read_ahead()
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    @property
    def next_elements(self) -> int:
        """Elements of all tensors of the next group."""
        return sum(
            math.prod(where.shape) for extent in self._groups[0] for _, where in extent.tensors
        )

    def next_group(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor of the next group's tensors, by file and offset.

        Raises:
            OSError: a file cannot be read, or ended early; names it.
        """
        for extent in self._groups.popleft():
            data = self._reads.popleft().result()
            for name, where in extent.tensors:
                yield name, _tensor(data, where, extent.begin)
            del data
            self._ahead_bytes -= extent.nbytes
            self._read_ahead()

    def _read_ahead(self) -> None:
        while self._waiting:
            extent = self._waiting[0]
            if self._ahead_bytes and self._ahead_bytes + extent.nbytes > WINDOW_BYTES:
                return
            self._waiting.popleft()
            self._ahead_bytes += extent.nbytes
            if extent.path not in self._descriptors:
                self._descriptors[extent.path] = open_direct(extent.path, os.O_RDONLY)
            descriptor = self._descriptors[extent.path]
            self._reads.append(self._threads.submit(self._read, descriptor, extent))

    def _read(self, descriptor: int, extent: _Extent) -> Bytes:
        data = self._buffer(extent.nbytes)
        count = read_into(descriptor, data.data, extent.begin)
        if count < extent.nbytes:
            raise OSError(
                f"{extent.path} ended at byte {extent.begin + count}, {extent.end} are needed"
            )
        return data

    def _buffer(self, nbytes: int) -> Bytes:
        """Memory for an extent, used again once no tensor lies in it."""
        usual = EXTENT_BYTES + ALIGNMENT
        if nbytes > usual:
            return aligned_buffer(nbytes + -nbytes % ALIGNMENT)
        try:
            whole = self._buffers.pop()
        except IndexError:
            whole = aligned_buffer(usual + -usual % ALIGNMENT)
        part = whole[: nbytes + -nbytes % ALIGNMENT]
        weakref.finalize(part, self._buffers.append, whole).atexit = False
        return part


@dataclass(frozen=True, slots=True)
class _Extent:
    path: Path
    begin: int  # aligned
    end: int
    tensors: list[tuple[str, TensorRange]]

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def _extents(tensors: Sequence[tuple[str, TensorRange]]) -> list[_Extent]:
    extents: list[_Extent] = []
    for name, where in sorted(tensors, key=lambda item: (item[1].path, item[1].offset)):
        end = where.offset + where.nbytes
        last = extents[-1] if extents else None
        if (
            last is not None
            and last.path == where.path
            and where.offset - last.end < ALIGNMENT
            and end - last.begin <= EXTENT_BYTES
        ):
            extents[-1] = _Extent(last.path, last.begin, end, [*last.tensors, (name, where)])
        else:
            begin = where.offset - where.offset % ALIGNMENT
            extents.append(_Extent(where.path, begin, end, [(name, where)]))
    return extents


def _tensor(data: Bytes, where: TensorRange, begin: int) -> torch.Tensor:
    """A tensor in ``data``, which it keeps alive."""
    dtype = DTYPES[where.dtype]
    offset = where.offset - begin
    if not where.nbytes:
        return torch.empty(where.shape, dtype=dtype, device="cpu")
    if offset % dtype.itemsize:  # allowed by the format, not by torch
        data, offset = data[offset : offset + where.nbytes].copy(), 0
    count = where.nbytes // dtype.itemsize
    flat = torch.frombuffer(data, dtype=dtype, count=count, offset=offset)
    return flat.view(where.shape)
