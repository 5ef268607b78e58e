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

from collections import deque
from dataclasses import dataclass, field

from vllm_moe_offload.transfer.copier import DEMAND_LANE, Copier
from vllm_moe_offload.transfer.device_prefetch import DevicePrefetches
from vllm_moe_offload.transfer.flights import (
    Flight,
    Flights,
    PendingRead,
    Requests,
    State,
    TransferError,
    raise_for_errors,
)
from vllm_moe_offload.transfer.host_copies import Copies, DeviceFlight, HostCopies
from vllm_moe_offload.transfer.host_tier import HostTier

MOST_QUEUED_PREFETCHES = 2
"""Prefetches that the device has to copy at a time, unless a layer computes for longer: one that
runs and one behind it. Copy engines work in order, so a demand waits for what is queued, and no
stream priority helps."""

_MOST_FILE_READS = 16
"""Of one call at a time: enough for the reader's threads, and copies begin after the first."""


@dataclass(slots=True)
class _PendingCopies(PendingRead[DeviceFlight]):
    absent: deque[DeviceFlight] = field(default_factory=deque)  # from host memory
    reads: deque[tuple[DeviceFlight, PendingRead[Flight]]] = field(default_factory=deque)
    copies: list[Copies] = field(default_factory=list)


class DeviceTransfer:
    """Brings experts into device slots; a :class:`~vllm_moe_offload.transfer.base.Transfer`."""

    def __init__(
        self,
        host: HostTier,
        copier: Copier,
        *,
        expert_ns: float | None = None,
    ) -> None:
        """Takes over ``host`` and ``copier``: :meth:`close` closes both.

        Serving builds all three with :func:`vllm_moe_offload.transfer.cuda.cuda_transfer`.

        Args:
            host: the tier that copies come from.
            copier: moves bytes from ``host.arena`` into the pool's slots.
            expert_ns: time to copy one expert.
        """
        store = host.store
        self.expert_ns = expert_ns
        self._host = host
        self._copier = copier
        self._copies = HostCopies(host, copier)
        self._flights = Flights(
            DeviceFlight, store.num_layers, store.num_experts, copier.num_slots
        )
        self._prefetches = DevicePrefetches(
            host, copier, self._copies, self._flights, MOST_QUEUED_PREFETCHES
        )

    @property
    def read_bytes(self) -> int:
        """See :class:`Transfer`."""
        return self._copies.copied_bytes

    @property
    def max_queued_prefetches(self) -> int:
        """See :class:`Transfer`."""
        return self._prefetches.max_queued

    @max_queued_prefetches.setter
    def max_queued_prefetches(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"max_queued_prefetches must be at least 1, got {count}")
        self._prefetches.max_queued = count

    # ---- demand ----------------------------------------------------------------------

    def read(self, requests: Requests) -> None:
        """:meth:`begin_read` and :meth:`end_read`."""
        self.end_read(self.begin_read(requests))

    def begin_read(self, requests: Requests) -> _PendingCopies:
        """See :class:`Transfer`; what lies in host memory is copied at once."""
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

    def end_read(self, pending: PendingRead[DeviceFlight]) -> None:
        """See :class:`Transfer`; waits for files, and has the compute stream wait for copies."""
        assert isinstance(pending, _PendingCopies)
        try:
            while pending.reads or pending.absent:
                self._begin_file_reads(pending)
                if pending.reads:
                    self._end_file_read(pending)
                else:  # by copies: prefetches hold half of the host slots at most
                    self._copies.wait_for_one(pending.copies)
            for copies in pending.copies:
                self._copier.join(copies.ticket)
            raise_for_errors(pending.flights)
        except BaseException:
            self._end_all(pending)
            raise
        for flight in pending.flights:
            flight.enter(State.LANDED)
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
            flight.enter(State.READING)
            flight.host_slot = slot
            pending.absent.popleft()
            pending.reads.append((flight, read))

    def _end_file_read(self, pending: _PendingCopies) -> None:
        """Waits for the oldest and queues its copy."""
        flight, read = pending.reads.popleft()
        self._land(flight, read)
        if flight.state is State.WAITING:
            pending.copies.append(self._copies.copy(DEMAND_LANE, [flight]))

    def _land(self, flight: DeviceFlight, read: PendingRead[Flight]) -> None:
        """Waits for a file read; on any failure its host slot is given back."""
        try:
            self._host.files.end_read(read)
        except BaseException as error:
            self._host.slots.abandon(flight.host_slot)
            flight.host_slot = -1
            if not isinstance(error, TransferError):
                raise
            self._flights.end(flight, State.FAILED, str(error))
        else:
            flight.enter(State.WAITING)
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
        """See :class:`Transfer`."""
        self._prefetches.promote(self._flights.prefetch_into(slot))

    def await_slot(self, slot: int) -> None:
        """See :class:`Transfer`."""
        flight = self._flights.prefetch_into(slot)
        if self._prefetches.join(flight):
            self._flights.forget([flight])
        else:
            self._flights.tell(flight, self.read)

    # ---- prefetch --------------------------------------------------------------------

    def prefetch(self, requests: Requests) -> int:
        """See :class:`Transfer`.

        Copies of prefetches are given to the device here alone, behind a layer call's demands.
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
        """See :class:`Transfer`."""
        return self._flights.has_unreported or self._prefetches.any_ended

    def poll(self) -> list[DeviceFlight]:
        """See :class:`Transfer`."""
        self._prefetches.take_in()
        self._copies.reap()
        return self._flights.report()

    def drop(self, slot: int) -> bool:
        """See :class:`Transfer`; a queued copy ends by itself."""
        return self._prefetches.drop(self._flights.prefetch_into(slot))

    def drain(self) -> None:
        """See :class:`Transfer`."""
        while self._prefetches.num_under_way:
            self._prefetches.advance()

    def close(self) -> None:
        """See :class:`Transfer`."""
        self._host.close()  # no thread writes into the arena any more
        self._copier.close()
        self._prefetches.close()
        self._copies.close()
        self._flights.close()
