"""TorchCopier: records into slots of a CUDA device by torch's streams and events."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vllm_moe_offload.cache.pool import SlotPool
from vllm_moe_offload.transfer.copier import DEMAND_LANE, PREFETCH_LANE
from vllm_moe_offload.transfer.page_lock import PageLocked


class CopyError(RuntimeError):
    """A call that the device failed; the message names call and reason."""


class TorchCopier:
    """A :class:`~vllm_moe_offload.transfer.copier.Copier` on two streams of a CUDA device.

    The compute stream is torch's current one at each call: vLLM's worker changes it.

    Attributes:
        num_slots: slots of the pool.
    """

    def __init__(self, pool: SlotPool, locked: PageLocked, *, cuda: Any = torch.cuda) -> None:
        """Takes over ``locked``: :meth:`close` unlocks it. Keeps the pool alive.

        Args:
            pool: on a CUDA device; copies go to its slots.
            locked: its arena is uint8 ``[slots, record_bytes]``, contiguous; records of
                ``pool.layout``.
            cuda: whose streams and events; tests have late ones.

        Raises:
            CopyError: the device or the driver refuses.
            ValueError: the pool is not on a CUDA device, or the arena holds other records.
        """
        arena = locked.arena
        record_bytes = pool.layout.record_bytes
        if pool.device.type != "cuda":
            raise ValueError(f"the pool is on {pool.device}, not on a CUDA device")
        if arena.ndim != 2 or arena.shape[1] != record_bytes or not arena.flags.c_contiguous:
            raise ValueError(
                f"the arena must be contiguous [slots, {record_bytes}], got {arena.shape}"
            )
        self.num_slots = pool.num_slots
        self._num_host_slots = len(arena)
        self._device = pool.device
        self._cuda = cuda
        self._tensors = _tensors_of(pool, torch.from_numpy(arena))
        with _reported("creating streams"):
            self._lanes = [cuda.Stream(pool.device) for _ in (DEMAND_LANE, PREFETCH_LANE)]
        self._computed = cuda.Event()
        self._events: list[Any] = []  # by ticket
        self._free_tickets: list[int] = []
        self._tickets_in_use: set[int] = set()
        self._finalizer = weakref.finalize(self, _end, self._lanes, locked, pool)
        self._finalizer.atexit = False  # the driver may be gone by then

    def copy(self, lane: int, pairs: Sequence[tuple[int, int]]) -> int:
        """As :meth:`Copier.copy`."""
        self._check(lane, pairs)
        stream = self._lanes[lane]
        ticket = self._take_ticket()
        try:
            with _reported("copying to the device"), self._cuda.stream(stream):
                for host_slot, slot in pairs:
                    for slots, records in self._tensors:
                        slots[slot].copy_(records[host_slot], non_blocking=True)
                self._events[ticket].record(stream)
        except BaseException:
            try:
                stream.synchronize()  # what was queued before the error
            finally:
                self.release(ticket)
            raise
        return ticket

    def done(self, ticket: int) -> bool:
        """As :meth:`Copier.done`."""
        with _reported("asking whether copies are complete"):
            return bool(self._event(ticket).query())

    def wait_on_host(self, ticket: int) -> None:
        """As :meth:`Copier.wait_on_host`."""
        with _reported("waiting for copies"):
            self._event(ticket).synchronize()

    def join(self, ticket: int) -> None:
        """As :meth:`Copier.join`."""
        with _reported("having the compute stream wait for copies"):
            self._cuda.current_stream(self._device).wait_event(self._event(ticket))

    def release(self, ticket: int) -> None:
        """As :meth:`Copier.release`.

        A wait keeps to what its event stood for when it was queued, so the next ticket may
        record the event anew.
        """
        self._event(ticket)
        self._tickets_in_use.remove(ticket)
        self._free_tickets.append(ticket)

    def after_compute(self) -> None:
        """As :meth:`Copier.after_compute`."""
        self._check_open()
        with _reported("having copies wait for the compute stream"):
            self._computed.record(self._cuda.current_stream(self._device))
            for lane in self._lanes:
                lane.wait_event(self._computed)

    def close(self) -> None:
        """Waits for all copies and unlocks the arena. Safe to repeat."""
        self._finalizer()

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise ValueError("the copier is closed")

    def _check(self, lane: int, pairs: Sequence[tuple[int, int]]) -> None:
        self._check_open()
        if lane not in (DEMAND_LANE, PREFETCH_LANE):
            raise ValueError(f"lane {lane} is not {DEMAND_LANE} or {PREFETCH_LANE}")
        if not pairs:
            raise ValueError("a copy needs at least one pair of slots")
        for host_slot, slot in pairs:
            # torch would take negative ones from the end.
            if not 0 <= host_slot < self._num_host_slots:
                raise ValueError(
                    f"host slot {host_slot} is outside [0, {self._num_host_slots})"
                )
            if not 0 <= slot < self.num_slots:
                raise ValueError(f"device slot {slot} is outside [0, {self.num_slots})")

    def _take_ticket(self) -> int:
        if not self._free_tickets:
            self._free_tickets.append(len(self._events))
            self._events.append(self._cuda.Event())  # the device has it once it is recorded
        ticket = self._free_tickets.pop()
        self._tickets_in_use.add(ticket)
        return ticket

    def _event(self, ticket: int) -> Any:
        self._check_open()
        if ticket not in self._tickets_in_use:
            raise ValueError(f"ticket {ticket} is not in use")
        return self._events[ticket]


def _tensors_of(pool: SlotPool, arena: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each tensor of a record: its slots and its part of all records, ``[., nbytes]`` bytes."""
    tensors = []
    begin = 0
    for spec in (*pool.layout.direct, *pool.layout.tail):
        if spec.nbytes:
            slots = pool.tensors[spec.name].view(pool.num_slots, -1).view(torch.uint8)
            tensors.append((slots, arena[:, begin : begin + spec.nbytes]))
        begin += spec.nbytes
    return tensors


def _end(lanes: list[Any], locked: PageLocked, pool: SlotPool) -> None:
    """Copies end before the memory at their ends is freed."""
    del pool
    try:
        with _reported("waiting for copies"):
            for lane in lanes:
                lane.synchronize()
    finally:
        locked.close()


@contextlib.contextmanager
def _reported(call: str) -> Iterator[None]:
    """The device's errors, in one line that names the call."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise CopyError(f"{call} failed: {reason}") from error
