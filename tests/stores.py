"""Small stores with known content, for the tests of store, reader and transfer."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from vllm_moe_offload.cache.layout import ExpertLayout, TensorSpec
from vllm_moe_offload.rank import Rank
from vllm_moe_offload.store import ExpertStore, StoreBuilder, StoreIdentity, joined, store_lock


def layout_of(*sizes: int) -> ExpertLayout:
    """Layout of tensors ``t0``, ``t1``, ... with slots of these bytes."""
    return ExpertLayout(
        tuple(TensorSpec(f"t{i}", (size,), "uint8", size) for i, size in enumerate(sizes))
    )


MIXED = layout_of(8192, 100, 4096, 11520, 1)
"""Two direct tensors and a tail of three, one of a single byte."""


def identity(**changes: object) -> StoreIdentity:
    fields: dict[str, object] = {
        "checkpoint": "c0ffee",
        "load_format": "auto",
        "dtype": "bfloat16",
        "quantization": "none",
        "kernel": "CPUExperts:avx512",
        "padded_shape": (64, 128),
        "rank": Rank(),
        "stages": (0,),
        "expert_placement": "linear",
        "vllm_version": "0.32.0",
    }
    return StoreIdentity.model_validate(fields | changes)


def layer_tensors(
    layout: ExpertLayout, num_experts: int, layer: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Slots of one layer, different for every layer, expert, tensor and seed."""
    rng = np.random.default_rng([seed, layer])
    return {
        spec.name: rng.integers(0, 256, (num_experts, spec.nbytes), dtype=np.uint8)
        for spec in layout.tensors
    }


def build(
    store_dir: Path,
    layout: ExpertLayout = MIXED,
    num_layers: int = 3,
    num_experts: int = 4,
    seed: int = 0,
    *,
    first_layer: int = 0,
    **changes: object,
) -> ExpertStore:
    """Builds a store of :func:`layer_tensors`, from that of ``first_layer`` on."""
    which = identity(**changes)
    directory = which.directory(store_dir, "test/model")
    with (
        store_lock(directory),
        StoreBuilder(directory, which, num_layers, num_experts) as builder,
    ):
        for layer in range(num_layers):
            tensors = layer_tensors(layout, num_experts, first_layer + layer, seed)
            builder.write_layer(layer, layout, tensors)
        return builder.commit()


def build_joined(
    store_dir: Path, layout: ExpertLayout, num_layers: Sequence[int], num_experts: int
) -> ExpertStore:
    """As :func:`build` of all layers, in as many stores."""
    stores: list[ExpertStore] = []
    for count in num_layers:
        first = sum(store.num_layers for store in stores)
        where = {"first_layer": first, "stages": (first,)}
        stores.append(build(store_dir, layout, count, num_experts, **where))
    return joined(*stores)


def assert_intact(store: ExpertStore) -> None:
    """Its file holds the records that its checksums are of."""
    content = store.path.read_bytes()
    assert len(content) == store.file_bytes
    for layer in range(store.num_layers):
        for expert in range(store.num_experts):
            begin = store.record_offset(layer, expert)
            record = content[begin : begin + store.layout.record_bytes]
            assert xxhash.xxh3_64_intdigest(record) == store.checksum(layer, expert)


def flip(store: ExpertStore, layer: int, expert: int, offset: int = 17) -> None:
    """Flips a bit of the record's byte at ``offset``, in place: who has the file open sees it."""
    store, layer = store.store_of(layer)
    with store.path.open("r+b") as file:
        file.seek(store.record_offset(layer, expert) + offset)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x40]))


def place(store_dir: Path, **changes: object) -> tuple[Path, StoreIdentity]:
    """Where a store is to be, and what it is of."""
    which = identity(**changes)
    return which.directory(store_dir, "test/model"), which


def leftovers(directory: Path) -> list[Path]:
    """Of builders that were killed."""
    return list(directory.parent.glob("*.building-*"))


def aligned(nbytes: int) -> np.ndarray:
    """Zeroed page-aligned bytes."""
    return np.frombuffer(mmap.mmap(-1, max(nbytes, 1)), np.uint8)[:nbytes]


def slots_for(layout: ExpertLayout, num_slots: int) -> dict[str, np.ndarray]:
    """Destinations of a transfer engine, filled with 0xEE."""
    slots = {}
    for spec in layout.tensors:
        slots[spec.name] = aligned(num_slots * spec.nbytes).reshape(num_slots, spec.nbytes)
        slots[spec.name].fill(0xEE)
    return slots
