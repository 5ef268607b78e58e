"""HostTier: experts in host memory, as records, above the store's file.

One arena of exactly the size asked for. A slot is a record as it lies in the file, so an expert
is one contiguous source for a copy to the device, and one O_DIRECT read, tail included.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from vllm_moe_offload.cache.host_memory import anonymous_region
from vllm_moe_offload.cache.layout import ExpertLayout, TensorSpec
from vllm_moe_offload.store import ExpertStore
from vllm_moe_offload.transfer.engine import DEFAULT_THREADS, TransferEngine
from vllm_moe_offload.transfer.host_slots import HostSlots
from vllm_moe_offload.transfer.record_reader import Bytes

MIN_SLOTS = 2
"""One that a prefetch may hold, and one that it may not."""

_FILL_BATCH = 16


class HostTier:
    """Records in host memory: all of them, or a cache of them.

    Attributes:
        store: the tier below.
        num_slots: slots of the arena.
        arena: uint8 ``[num_slots, record_bytes]``, page aligned, in huge pages where possible.
        slots: which expert lies where.
        files: reads records into the arena.
    """

    def __init__(
        self,
        store: ExpertStore,
        num_slots: int,
        *,
        num_threads: int = DEFAULT_THREADS,
        cpus: Sequence[int] = (),
        direct: bool = True,
        verify: bool = False,
    ) -> None:
        """Allocates the arena and opens the file; :meth:`fill` reads.

        Args:
            store: what to read.
            num_slots: experts that fit; more than the store has are not allocated.
            num_threads, cpus, direct, verify: as :class:`TransferEngine`. Records are
                checked when they arrive here.

        Raises:
            MemoryError: the system refuses the memory.
            TransferError: the file cannot be opened.
            ValueError: ``num_slots`` is less than :data:`MIN_SLOTS`.
        """
        if num_slots < MIN_SLOTS:
            raise ValueError(
                f"a host tier of {num_slots} slots is too small, it needs {MIN_SLOTS} at least"
            )
        total = store.num_layers * store.num_experts
        self.store = store
        self.num_slots = min(num_slots, total)
        self.holds_everything = self.num_slots == total
        record_bytes = store.layout.record_bytes
        nbytes = self.num_slots * record_bytes
        try:
            self.arena: Bytes = _memory(nbytes).reshape(self.num_slots, record_bytes)
        except OSError as error:
            raise MemoryError(
                f"cannot allocate {nbytes} bytes of host memory for {self.num_slots} experts: "
                f"{error}; lower host_gb"
            ) from error
        self.slots = HostSlots(self.num_slots)
        self.files = TransferEngine(
            _as_records(store),
            {_RECORD: self.arena},
            num_threads=num_threads,
            cpus=cpus,
            direct=direct,
            verify=verify,
        )

    def fill(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Reads experts into all slots: every one in store order, or as many of each layer.

        Reading before the memory is page-locked lets the I/O threads fault it in.

        Args:
            progress: called with the number of experts read and their total.

        Raises:
            TransferError: one could not be read.
        """
        store, slots = self.store, self.slots
        experts = [
            (layer, e) for layer in range(store.num_layers) for e in range(store.num_experts)
        ]
        if not self.holds_everything:
            experts.sort(key=lambda expert: expert[::-1])
            experts = sorted(experts[: self.num_slots])
        under_way = []
        num_read = 0
        batches = [experts[i : i + _FILL_BATCH] for i in range(0, len(experts), _FILL_BATCH)]
        for batch in [*batches, []]:
            requests = []
            for layer, expert in batch:
                slot = slots.reserve(layer, expert)
                assert slot is not None  # there are as many as experts
                requests.append((layer, expert, slot))
            under_way.append((requests, self.files.begin_read(requests)))
            if len(under_way) < 2 and batch:
                continue  # the disk is never without work
            requests, pending = under_way.pop(0)
            self.files.end_read(pending)
            for _, _, slot in requests:
                slots.arrived(slot)
                slots.release(slot)
            num_read += len(requests)
            if progress is not None:
                progress(num_read, len(experts))

    def close(self) -> None:
        """Ends the I/O threads; the arena stays for whoever still reads it."""
        self.files.close()


def _memory(nbytes: int) -> Bytes:
    """Pages of this process alone, huge ones where possible.

    A child must not share them: where the kernel then gives the parent a fresh page for what it
    writes, a device would go on reading the old one.
    """
    region = anonymous_region(nbytes)
    region.madvise(mmap.MADV_DONTFORK)
    return np.frombuffer(region, np.uint8)


_RECORD = "record"


def _as_records(store: ExpertStore) -> ExpertStore:
    """The same file, each expert one tensor: the whole record."""
    nbytes = store.layout.record_bytes
    return replace(
        store, layout=ExpertLayout((TensorSpec(_RECORD, (nbytes,), "uint8", nbytes),))
    )
