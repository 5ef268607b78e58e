"""What one expert is made of: its tensors, their bytes, and how a record lies in a file.

A *record* holds all parameters of one expert in the form the kernel reads
(after ``process_weights_after_loading``). Tensors whose row is a multiple of
:data:`ALIGNMENT` lie first, unpadded, so that one O_DIRECT ``preadv`` scatters them
straight into the slots of the pool. All others (a bias of 11,520 bytes would be
refused with EINVAL) share one aligned *tail* that is read into a bounce buffer and copied.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

ALIGNMENT = 4096
"""Bytes. O_DIRECT needs file offsets, lengths and addresses aligned to the logical block
size; 4 KiB covers every block device in use."""


def round_up(value: int, multiple: int = ALIGNMENT) -> int:
    """Smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class TensorSpec:
    """One parameter of an expert: a row of the layer's ``[num_experts, ...]`` tensor.

    Attributes:
        name: parameter name in the layer, e.g. ``w13_weight``.
        shape: shape of one expert's row, without the expert dimension.
        dtype: torch's name of the element type without the ``torch.`` prefix.
        nbytes: bytes of one row.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int

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

    def to_json(self) -> list[dict[str, object]]:
        """Plain data for a manifest; inverse of :meth:`from_json`."""
        return [
            {"name": s.name, "shape": list(s.shape), "dtype": s.dtype, "nbytes": s.nbytes}
            for s in self.tensors
        ]

    @classmethod
    def from_json(cls, data: Iterable[dict[str, object]]) -> ExpertLayout:
        """Layout from a manifest's ``layout`` list.

        Raises:
            ValueError: a field is missing or of the wrong kind.
        """
        specs = []
        for entry in data:
            try:
                shape = entry["shape"]
                if not isinstance(shape, list):
                    raise TypeError(f"shape is {type(shape).__name__}, not a list")
                specs.append(
                    TensorSpec(
                        str(entry["name"]),
                        tuple(int(n) for n in shape),
                        str(entry["dtype"]),
                        int(str(entry["nbytes"])),
                    )
                )
            except (KeyError, TypeError) as error:
                raise ValueError(f"layout entry {entry!r} is not valid: {error}") from error
        return cls(tuple(specs))
