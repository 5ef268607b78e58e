"""Reads of whole records by the C++ file reader: a ticket each, from submission to its end."""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from vllm_moe_offload.cache.layout import ALIGNMENT, ExpertLayout
from vllm_moe_offload.native import (
    Completion,
    Extent,
    NativeError,
    Read,
    check,
    core,
    last_error,
)
from vllm_moe_offload.store import ExpertStore

logger = logging.getLogger("vllm.moe_offload")

Bytes = npt.NDArray[np.uint8]

DEMAND, PREFETCH = 0, 1
"""Priorities: no prefetch begins while a demand waits."""

_MAX_TICKETS = 64
_MIN_TICKETS = 4
_MAX_TAIL_BUFFERS_BYTES = 64 << 20
_END_OF_FILE = -1
_DAMAGE = (errno.EIO, _END_OF_FILE)
"""Errors of a read after which the file is not worth keeping."""


class _Ticket:
    """Extents and tail buffer of one read, made once and used for many records."""

    def __init__(self, layout: ExpertLayout) -> None:
        self.extents = (Extent * (len(layout.direct) + bool(layout.tail_bytes)))()
        self.direct = [self.extents[i] for i in range(len(layout.direct))]
        for extent, spec in zip(self.direct, layout.direct, strict=True):
            extent.length = spec.nbytes
        self.tail = np.zeros(0, np.uint8)
        if layout.tail_bytes:
            self.tail = np.frombuffer(mmap.mmap(-1, layout.tail_bytes), np.uint8)
            self.extents[-1].destination = self.tail.ctypes.data
            self.extents[-1].length = layout.tail_bytes
        self.record = (-1, -1, -1)  # layer, expert, slot
        self.needs_check = True


class RecordReader:
    """Reads records of one store into slots, several at a time.

    Tensors of a record that O_DIRECT can place go straight into their slots; the tail goes
    through the ticket's buffer and is copied when all bytes are there.

    The first time that a record is read it is compared with its checksum: the file may have been
    changed at any time since it was written, and nothing but its bytes would say so. Hashing is
    several times as quick as a disk, but not free, so later reads are compared only on request.

    Attributes:
        read_bytes: bytes of records that arrived.
        direct: whether reads bypass the page cache.
        num_slots: slots that every destination has.
        num_tickets: most reads in flight at once.
        free_tickets: tickets that :meth:`submit` may use.
    """

    def __init__(
        self,
        store: ExpertStore,
        destinations: Mapping[str, Bytes],
        *,
        num_threads: int,
        cpus: Sequence[int],
        direct: bool,
        verify: bool,
    ) -> None:
        """As :class:`TransferEngine`; NativeError if the file cannot be opened."""
        layout = store.layout
        self.read_bytes = 0
        self.num_slots = _check_destinations(layout, destinations)
        self._store = store
        self._verify = verify
        self._is_checked = [bytearray(store.num_experts) for _ in range(store.num_layers)]
        self._direct_slots = [destinations[spec.name] for spec in layout.direct]
        self._direct_bases = [
            (slots.ctypes.data, slots.shape[1]) for slots in self._direct_slots
        ]
        self._tail_parts: list[tuple[Bytes, int, int]] = []
        begin = 0
        for spec in layout.tail:
            self._tail_parts.append((destinations[spec.name], begin, begin + spec.nbytes))
            begin += spec.nbytes

        affordable = _MAX_TAIL_BUFFERS_BYTES // max(layout.tail_bytes, 1)
        self.num_tickets = min(max(affordable, _MIN_TICKETS), _MAX_TICKETS)
        self.free_tickets = list(range(self.num_tickets))
        self._tickets = [_Ticket(layout) for _ in self.free_tickets]
        self._reads = (Read * self.num_tickets)()
        self._read_items = list(self._reads)  # views, as indexing makes a new one each time
        self._completions = (Completion * self.num_tickets)()
        self._reader, self.direct = _open(store, num_threads, cpus, direct)
        self._num_ended = ctypes.c_int32.from_address(core.vmo_reader_num_ended(self._reader))
        # The threads must end before the slots they write to are freed.
        self._finalizer = weakref.finalize(self, core.vmo_reader_close, self._reader)
        self._finalizer.atexit = False

    @property
    def has_ended(self) -> bool:
        """Whether :meth:`wait` would report something at once."""
        return bool(self._num_ended.value)

    def submit(self, records: Sequence[tuple[int, int, int]], priority: int) -> list[int]:
        """Begins to read records; returns their tickets.

        As many of :attr:`free_tickets` must be left. Raises NativeError if a read is
        impossible, with nothing changed.

        Args:
            records: ``(layer, expert, slot)`` each, at least one.
            priority: :data:`DEMAND` or :data:`PREFETCH`.
        """
        tickets = self.free_tickets[-len(records) :]
        for read, index, record in zip(self._read_items, tickets, records, strict=False):
            layer, expert, slot = record
            ticket = self._tickets[index]
            ticket.record = record
            for extent, (base, nbytes) in zip(ticket.direct, self._direct_bases, strict=True):
                extent.destination = base + slot * nbytes
            read.offset = self._store.record_offset(layer, expert)
            ticket.needs_check = self._verify or not self._is_checked[layer][expert]
            read.extents = ticket.extents
            read.num_extents = len(ticket.extents)
            read.priority = priority
            read.tag = index
        check(core.vmo_reader_submit(self._reader, self._reads, len(records)))
        del self.free_tickets[-len(records) :]
        return tickets

    def needs_check(self, index: int) -> bool:
        """Whether :meth:`wait` will take the time to compare this ticket's record with its
        checksum, if it arrives."""
        return self._tickets[index].needs_check

    def promote(self, index: int) -> None:
        """Makes what is left of a prefetch a demand."""
        check(core.vmo_reader_promote(self._reader, index))

    def drop(self, index: int) -> bool:
        """Drops a read that has not begun; False if it has, then its end comes.

        Of one that began no more than is under way is read; it ends with a reason, unless
        nothing was left.
        """
        dropped = bool(check(core.vmo_reader_drop(self._reader, index)))
        if dropped:
            self.free_tickets.append(index)
        return dropped

    def wait(self, timeout_ms: int, min_count: int = 1) -> Iterator[tuple[int, str | None]]:
        """Tickets of reads that ended, each with the reason why its slot is not good.

        Sleeps until there are ``min_count``, ``timeout_ms`` passed (0: at once, -1: never
        does) or no more are in flight. The iterator must be consumed. A store whose record
        turns out to be damaged is condemned (:meth:`ExpertStore.condemn`).
        """
        completions = self._completions
        count = check(
            core.vmo_reader_wait(
                self._reader, completions, self.num_tickets, min_count, timeout_ms
            )
        )
        for i in range(count):
            completion = completions[i]
            index = completion.tag
            reason: str | None
            is_damaged = completion.error in _DAMAGE
            if completion.error:
                reason = _reason(completion.error)
            else:
                self.read_bytes += completion.bytes
                reason = self._land(self._tickets[index])
                is_damaged = reason is not None
            if is_damaged:
                layer, expert, _ = self._tickets[index].record
                self._store.condemn(layer, expert, str(reason))
            self.free_tickets.append(index)
            yield index, reason

    def reclaim_tickets(self) -> None:
        """Makes all tickets free again; only while nothing is in flight."""
        self.free_tickets = list(range(self.num_tickets))

    def close(self) -> None:
        """Waits for running reads, drops the others, ends the threads. Safe to repeat."""
        self._finalizer()

    def _land(self, ticket: _Ticket) -> str | None:
        """All bytes arrived: copies the tail, unless the record turns out to be damaged."""
        if ticket.needs_check:
            damage = self._check(ticket)
            if damage is not None:
                return damage
        slot = ticket.record[2]
        for slots, begin, end in self._tail_parts:
            slots[slot] = ticket.tail[begin:end]
        return None

    def _check(self, ticket: _Ticket) -> str | None:
        """Compares the ticket's record with its checksum; in which way it is damaged."""
        layer, expert, slot = ticket.record
        digest = xxhash.xxh3_64()
        for slots in self._direct_slots:
            digest.update(slots[slot].data)  # lets go of the interpreter's lock
        digest.update(ticket.tail.data)
        wanted = self._store.checksum(layer, expert)
        if digest.intdigest() != wanted:
            return f"its checksum is {digest.hexdigest()}, not {wanted:016x}"
        self._is_checked[layer][expert] = True
        return None


def _open(
    store: ExpertStore, num_threads: int, cpus: Sequence[int], direct: bool
) -> tuple[int, bool]:
    """The native reader, and whether it bypasses the page cache."""
    affinity = (ctypes.c_int32 * len(cpus))(*cpus)

    def open_files(direct: bool) -> int:
        paths = (ctypes.c_char_p * len(store.paths))(*map(os.fsencode, store.paths))
        return int(
            core.vmo_reader_open(paths, len(paths), direct, num_threads, affinity, len(cpus))
            or 0
        )

    reader = open_files(direct)
    if not reader and direct:
        refused = last_error()
        reader = open_files(False)
        if reader:
            direct = False
            logger.warning(
                "MoE offload: %s; reading through the page cache, which is slower and takes "
                "memory. Set store_dir to a local disk.",
                refused,
            )
    if not reader:
        raise last_error()
    size = core.vmo_reader_file_bytes(reader)
    if size != store.file_bytes:
        core.vmo_reader_close(reader)
        names = ", ".join(map(str, store.paths))
        raise NativeError(f"{names}: {size} bytes instead of {store.file_bytes}")
    return reader, direct


def _check_destinations(layout: ExpertLayout, destinations: Mapping[str, Bytes]) -> int:
    """Number of slots, if every tensor has as many, and reads can go to them."""
    names = {spec.name for spec in layout.tensors}
    if destinations.keys() != names:
        raise ValueError(f"destinations {sorted(destinations)} are not {sorted(names)}")
    num_slots = len(destinations[layout.tensors[0].name])
    for spec in layout.tensors:
        slots = destinations[spec.name]
        if slots.dtype != np.uint8 or slots.shape != (num_slots, spec.nbytes):
            raise ValueError(
                f"{spec.name} must be uint8 [{num_slots}, {spec.nbytes}], got {slots.dtype} "
                f"{slots.shape}"
            )
        if not (slots.flags.c_contiguous and slots.flags.writeable):
            raise ValueError(f"{spec.name} must be contiguous and writeable")
        if spec.is_direct and slots.ctypes.data % ALIGNMENT:
            raise ValueError(f"{spec.name} must begin at a multiple of {ALIGNMENT} bytes")
    return num_slots


def _reason(error: int) -> str:
    return "the file ends too early" if error == _END_OF_FILE else os.strerror(error)
