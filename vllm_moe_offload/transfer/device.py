"""DeviceTransfer: from the file over host memory into the slots of a pool on a device.

An expert that lies in host memory is copied; one that does not is read from the file into a
host slot first. The host waits for files only: for copies the compute stream waits.

What keeps bytes right, as copies run beside kernels and long after the call that queued them:

* Kernels launched earlier may still read a slot that was given away since. Copies queued in a
  call run after what was launched before it (``Copier.after_compute``); slots of prefetches
  that are queued later were given away before the call that asked for them.
* Kernels launched later read a slot only once its copy ended: :meth:`DeviceTransfer.end_read`
  and :meth:`DeviceTransfer.await_slot` make the compute stream wait (``Copier.join``),
  :meth:`DeviceTransfer.poll` reports what the host saw complete.
* A host slot is held from before its first byte arrives until the host saw its copies complete.
* Where a call fails, the host waits for all that the call has queued.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_moe_offload.transfer.copier import DEMAND_LANE, Copier
from vllm_moe_offload.transfer.device_prefetch import DevicePrefetches, StagedFlight
from vllm_moe_offload.transfer.flights import Flight, Flights, PendingRead, raise_for_errors
from vllm_moe_offload.transfer.host_copies import Copies, HostCopies
from vllm_moe_offload.transfer.host_tier import HostTier
from vllm_moe_offload.transfer.outcome import FinishedPrefetch, TransferError

MOST_QUEUED_PREFETCHES = 2
"""Prefetches that the device has to copy at a time: one that runs and one behind it. Copy
engines work in order, so a demand waits for what is queued, and no stream priority helps."""

_MOST_FILE_READS = 16
"""Of one call at a time: enough for the reader's threads, and copies begin after the first."""


@dataclass(slots=True)
class _PendingCopies(PendingRead[StagedFlight]):
    absent: deque[StagedFlight] = field(default_factory=deque)  # from host memory
    reads: deque[tuple[StagedFlight, PendingRead[Flight]]] = field(default_factory=deque)
    copies: list[Copies] = field(default_factory=list)


class DeviceTransfer:
    """Brings experts into device slots; a :class:`~vllm_moe_offload.transfer.base.Transfer`.

    Attributes:
        read_ns: time that callers waited for files.
        expert_ns: time to copy one expert, where the builder measured it.
    """

    def __init__(
        self,
        host: HostTier,
        copier: Copier,
        *,
        max_queued_prefetches: int = MOST_QUEUED_PREFETCHES,
        expert_ns: float | None = None,
    ) -> None:
        """Takes over ``host`` and ``copier``: :meth:`close` closes both.

        Serving builds all three with :func:`vllm_moe_offload.transfer.cuda.cuda_transfer`.

        Args:
            host: the tier that copies come from.
            copier: moves bytes from ``host.arena`` into the pool's slots.
            max_queued_prefetches: as :data:`MOST_QUEUED_PREFETCHES`.
            expert_ns: time to copy one expert.

        Raises:
            ValueError: ``max_queued_prefetches`` is less than 1.
        """
        _check_queued(max_queued_prefetches)
        store = host.store
        self.read_ns = 0
        self.expert_ns = expert_ns
        self._host = host
        self._copier = copier
        self._copies = HostCopies(host, copier)
        self._flights = Flights(
            StagedFlight, store.num_layers, store.num_experts, copier.num_slots
        )
        self._prefetches = DevicePrefetches(
            host, copier, self._copies, self._flights, max_queued_prefetches
        )

    @property
    def read_bytes(self) -> int:
        """Bytes of experts copied to the device."""
        return self._copies.copied_bytes

    @property
    def file_bytes(self) -> int:
        """Bytes of records that arrived in host memory."""
        return self._host.files.read_bytes

    @property
    def verify_failures(self) -> int:
        """Records whose checksum was wrong."""
        return self._host.files.verify_failures

    @property
    def max_queued_prefetches(self) -> int:
        """Prefetches that the device has to copy at a time, at most."""
        return self._prefetches.max_queued

    @max_queued_prefetches.setter
    def max_queued_prefetches(self, count: int) -> None:
        _check_queued(count)
        self._prefetches.max_queued = count

    # ---- demand ----------------------------------------------------------------------

    def read(self, requests: Sequence[tuple[int, int, int]]) -> None:
        """:meth:`begin_read` and :meth:`end_read`."""
        self.end_read(self.begin_read(requests))

    def begin_read(self, requests: Sequence[tuple[int, int, int]]) -> _PendingCopies:
        """Queues copies of what lies in host memory; begins to read the rest.

        Args:
            requests: ``(layer, expert, slot)``, of any number.

        Raises:
            ValueError: a slot or expert is in flight, twice in the call, or does not exist;
                nothing was begun.
        """
        pending = _PendingCopies(self._flights.register(requests, is_prefetch=False))
        if not requests:
            return pending
        try:
            self._copier.after_compute()
            self._copies.reap()
            resident = []
            for flight in pending.flights:
                slot = self._host.slots.find(flight.layer, flight.expert)
                if slot is None:
                    pending.absent.append(flight)
                else:
                    flight.host_slot = slot
                    resident.append(flight)
            if resident:
                pending.copies.append(self._copies.copy(DEMAND_LANE, resident))
            self._begin_file_reads(pending)
        except BaseException:
            self._end_all(pending)
            raise
        return pending

    def end_read(self, pending: PendingRead[StagedFlight]) -> None:
        """Waits for files, queues the copies, and has the compute stream wait for all.

        Raises:
            TransferError: some could not be read. All reads and copies of the call ended.
        """
        assert isinstance(pending, _PendingCopies)
        began = time.perf_counter_ns()
        try:
            while pending.reads or pending.absent:
                self._begin_file_reads(pending)
                if pending.reads:
                    self._end_file_read(pending)
                else:  # by copies: prefetches hold half of the host slots at most
                    self._copies.wait_for_one(pending.copies)
            for copies in pending.copies:
                self._copier.join(copies.ticket)
        except BaseException:
            self._end_all(pending)
            raise
        finally:
            self.read_ns += time.perf_counter_ns() - began
        if any(flight.error is not None for flight in pending.flights):
            self._end_all(pending)
            raise_for_errors(pending.flights)
        self._copies.depart(pending.copies)
        self._flights.forget(pending.flights)

    def _begin_file_reads(self, pending: _PendingCopies) -> None:
        """As many as there are host slots for, and no more than are of use."""
        slots = self._host.slots
        while pending.absent and len(pending.reads) < _MOST_FILE_READS:
            flight = pending.absent[0]
            slot = slots.reserve(flight.layer, flight.expert)
            if slot is None:
                return
            try:
                read = self._host.files.begin_read([(flight.layer, flight.expert, slot)])
            except BaseException:
                slots.abandon(slot)
                raise
            flight.host_slot = slot
            pending.absent.popleft()
            pending.reads.append((flight, read))

    def _end_file_read(self, pending: _PendingCopies) -> None:
        """Waits for the oldest and queues its copy."""
        flight, read = pending.reads.popleft()
        self._land(flight, read)
        if flight.error is None:
            pending.copies.append(self._copies.copy(DEMAND_LANE, [flight]))

    def _land(self, flight: StagedFlight, read: PendingRead[Flight]) -> None:
        """Waits for a file read; on any failure its host slot is given back."""
        try:
            self._host.files.end_read(read)
        except BaseException as error:
            self._host.slots.abandon(flight.host_slot)
            flight.host_slot = -1
            if not isinstance(error, TransferError):
                raise
            flight.error = str(error)
        else:
            self._host.slots.arrived(flight.host_slot)

    def _end_all(self, pending: _PendingCopies) -> None:
        """A call fails: nothing may write into a slot that it gives up."""
        try:
            while pending.reads:
                self._land(*pending.reads.popleft())
            for flight in pending.flights:
                if flight.host_slot >= 0:
                    self._host.slots.release(flight.host_slot)
                    flight.host_slot = -1
            while pending.copies:
                self._copier.wait_on_host(pending.copies[-1].ticket)
                self._copies.release(pending.copies.pop())
        finally:
            self._flights.forget(pending.flights)

    def promote(self, slot: int) -> None:
        """Gives the prefetch into ``slot`` a demand's priority.

        Raises:
            ValueError: no prefetch into ``slot`` is in flight.
        """
        self._prefetches.promote(self._prefetch_into(slot))

    def await_slot(self, slot: int) -> None:
        """Waits until kernels may be launched on ``slot``; :meth:`poll` will not report it.

        Raises:
            TransferError: the expert could not be read.
            ValueError: no prefetch into ``slot`` is in flight.
        """
        flight = self._prefetch_into(slot)
        began = time.perf_counter_ns()
        try:
            joined = self._prefetches.join(flight)
        finally:
            self.read_ns += time.perf_counter_ns() - began
        if joined:
            self._flights.forget([flight])
            return
        self._flights.take(flight)
        if flight.dropped and flight.error is not None:
            self.read([(flight.layer, flight.expert, slot)])  # wanted again, and cut short
            return
        raise_for_errors([flight])

    # ---- prefetch --------------------------------------------------------------------

    def prefetch(self, requests: Sequence[tuple[int, int, int]]) -> int:
        """Brings in experts when no demand waits; returns at once.

        Also gives the device the next copies of prefetches asked for before. That is done here
        alone, behind the demands of a layer call, so that no prefetch gets in front of them.

        Args:
            requests: ``(layer, expert, slot)``, the most urgent first.

        Returns:
            How many of them are in flight now, from the front: file reads and host slots are
            limited.

        Raises:
            ValueError: as in :meth:`begin_read`.
        """
        flights = self._flights.register(requests, is_prefetch=True)
        begun = 0
        try:
            if flights:
                self._copier.after_compute()
                self._copies.reap()
            while begun < len(flights) and self._prefetches.begin(flights[begun]):
                begun += 1
            self._prefetches.queue()
        except BaseException:
            self._prefetches.withdraw(flights[:begun])
            self._flights.forget(flights[begun:])
            raise
        self._flights.forget(flights[begun:])
        return begun

    @property
    def has_news(self) -> bool:
        """Whether :meth:`poll` would report or note anything; costs next to nothing."""
        return self._flights.has_unreported or self._prefetches.any_ended

    def poll(self) -> list[FinishedPrefetch]:
        """Prefetches that ended and were not reported yet; does not wait."""
        self._prefetches.take_in()
        self._copies.reap()
        return self._flights.report()

    def cancel(self, slot: int) -> bool:
        """Drops the prefetch into ``slot`` if neither its read nor its copy has begun.

        Returns:
            True if dropped: ``slot`` is free and unchanged. False if it began: its end will
            be reported.

        Raises:
            ValueError: no prefetch into ``slot`` is in flight.
        """
        flight = self._prefetch_into(slot)
        cancelled = self._prefetches.cancel(flight)
        if cancelled:
            self._flights.forget([flight])
        return cancelled

    def drop(self, slot: int) -> bool:
        """As :meth:`cancel`, and ends a read that began; a queued copy ends by itself.

        Returns:
            True if ``slot`` is free now. False if its end will be reported, as ``dropped`` if
            the slot does not hold the expert.
        """
        flight = self._prefetch_into(slot)
        dropped = self._prefetches.drop(flight)
        if dropped:
            self._flights.forget([flight])
        return dropped

    def cancel_all(self) -> list[int]:
        """Drops all prefetches of which nothing has begun; returns their slots."""
        return [
            slot
            for slot in self._flights.slots
            if self._flights.into(slot).is_prefetch and self.cancel(slot)
        ]

    def drain(self) -> None:
        """Waits until no prefetch is under way; :meth:`poll` reports what ended."""
        while self._prefetches.num_under_way:
            self._prefetches.advance()

    def _prefetch_into(self, slot: int) -> StagedFlight:
        flight = self._flights.into(slot)
        if not flight.is_prefetch:
            raise ValueError(f"slot {slot} is in flight for a demand, not for a prefetch")
        return flight

    def close(self) -> None:
        """Waits for what runs, drops the rest, frees host memory. Safe to repeat."""
        self._host.close()  # no thread writes into the arena any more
        self._copier.close()
        self._prefetches.close()
        self._copies.close()
        self._flights.close()


def _check_queued(count: int) -> None:
    if count < 1:
        raise ValueError(f"max_queued_prefetches must be at least 1, got {count}")
