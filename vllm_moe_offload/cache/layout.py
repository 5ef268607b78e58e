"""What one expert is made of: its tensors, their bytes, and how a record lies in a file.

A *record* holds all parameters of one expert in the form the kernel reads
(after ``process_weights_after_loading``). Tensors whose row is a multiple of
:data:`ALIGNMENT` lie first, unpadded, so that one O_DIRECT ``preadv`` scatters them
straight into the slots of the pool. All others (a bias of 11,520 bytes would be
refused with EINVAL) share one aligned *tail* that is read into a bounce buffer and copied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

ALIGNMENT = 4096
"""Bytes. O_DIRECT needs file offsets, lengths and addresses aligned to the logical block
size; 4 KiB covers every block device in use."""


ELEMENT_BYTES = {
    "bool": 1,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
}
"""Of element types that experts may have, by torch's names without the ``torch.`` prefix."""


_MOST_DIMENSIONS = 8
_MOST_ELEMENTS = 1 << 48


def round_up(value: int, multiple: int = ALIGNMENT) -> int:
    """Smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class TensorSpec:
    """One parameter of an expert: a row of the layer's ``[num_experts, ...]`` tensor.

    Attributes:
        name: parameter name in the layer, e.g. ``w13_weight``.
        shape: shape of one expert's row, without the expert dimension.
        dtype: its element type, one of :data:`ELEMENT_BYTES`.
        nbytes: bytes of one row.

    Raises:
        ValueError: the four contradict each other.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"name={self.name!r} is no parameter's")
        if self.dtype not in ELEMENT_BYTES:
            raise ValueError(f"dtype={self.dtype!r} is none of {', '.join(ELEMENT_BYTES)}")
        if len(self.shape) > _MOST_DIMENSIONS or any(
            not 0 <= size <= _MOST_ELEMENTS for size in self.shape
        ):
            raise ValueError(
                f"shape={self.shape} must be {_MOST_DIMENSIONS} sizes at most, each from 0 to "
                f"{_MOST_ELEMENTS}"
            )
        expected = math.prod(self.shape) * ELEMENT_BYTES[self.dtype]
        if self.nbytes != expected:
            raise ValueError(
                f"nbytes={self.nbytes}, but shape={self.shape} of {self.dtype} are {expected}"
            )

    @property
    def is_direct(self) -> bool:
        """Whether the slot can be the target of an O_DIRECT read."""
        return self.nbytes > 0 and self.nbytes % ALIGNMENT == 0


@dataclass(frozen=True)
class ExpertLayout:
    """Layout of one expert, and of its record in the store.

    Layers with equal layouts share one slot pool.
    """

    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.tensors]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"expert tensors must be non-empty and distinct, got {names}")
        if not self.expert_bytes:
            raise ValueError(f"expert tensors must hold something, {names} are empty")

    @cached_property
    def direct(self) -> tuple[TensorSpec, ...]:
        """Tensors read straight into their slots, in record order."""
        return tuple(spec for spec in self.tensors if spec.is_direct)

    @cached_property
    def tail(self) -> tuple[TensorSpec, ...]:
        """Tensors read through the tail's bounce buffer, in record order."""
        return tuple(spec for spec in self.tensors if not spec.is_direct)

    @cached_property
    def expert_bytes(self) -> int:
        """Bytes of one expert in fast memory."""
        return sum(spec.nbytes for spec in self.tensors)

    @cached_property
    def tail_bytes(self) -> int:
        """Bytes of the tail in the record, padding included (0 without tail tensors)."""
        return round_up(sum(spec.nbytes for spec in self.tail))

    @cached_property
    def record_bytes(self) -> int:
        """Bytes of one record in the store; a multiple of :data:`ALIGNMENT`."""
        return sum(spec.nbytes for spec in self.direct) + self.tail_bytes
