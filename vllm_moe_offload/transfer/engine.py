"""TransferEngine: from the store's file into slots of memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllm_moe_offload.native import NativeError
from vllm_moe_offload.store import ExpertStore
from vllm_moe_offload.transfer.flights import (
    Flight,
    Flights,
    PendingRead,
    Requests,
    State,
    TransferError,
    raise_for_errors,
)
from vllm_moe_offload.transfer.record_reader import DEMAND, PREFETCH, Bytes, RecordReader

DEFAULT_THREADS = 4
"""Reach the bandwidth of the disks measured so far; more threads did not read faster."""

# Waits return now and then, so that the interpreter can handle signals.
_WAIT_MS = 500


class TransferEngine:
    """Reads experts of one store into slots of memory; a :class:`Transfer`."""

    expert_ns: float | None = None
    max_queued_prefetches = 1

    def __init__(
        self,
        store: ExpertStore,
        destinations: Mapping[str, Bytes],
        *,
        num_threads: int = DEFAULT_THREADS,
        cpus: Sequence[int] = (),
        direct: bool = True,
        verify: bool = False,
    ) -> None:
        """Opens the store's file and starts the I/O threads.

        Args:
            store: what to read.
            destinations: for every tensor of ``store.layout`` its slots as contiguous uint8
                ``[num_slots, nbytes]``. Those of direct tensors must begin at a multiple of
                4 KiB. Kept alive by the engine.
            num_threads: I/O threads; each has one read of up to 1 MiB under way.
            cpus: cores they may run on; empty: where the calling thread may.
            direct: bypass the page cache. Where the file system refuses, a warning is
                logged and reads go through it.
            verify: check a record's checksum whenever it is read, not only the first time.

        Raises:
            TransferError: the file cannot be opened, or its size changed.
            ValueError: a destination is missing, misaligned or of the wrong shape.
        """
        self._store = store
        try:
            self._reader = RecordReader(
                store,
                destinations,
                num_threads=num_threads,
                cpus=cpus,
                direct=direct,
                verify=verify,
            )
        except NativeError as error:
            raise TransferError(f"cannot open the expert store: {error}") from error
        # Prefetches must not make a demand wait for a ticket.
        self._tickets_for_demand = self._reader.num_tickets // 2
        self._by_ticket: dict[int, Flight] = {}
        self._flights = Flights(
            Flight, store.num_layers, store.num_experts, self._reader.num_slots
        )

    @property
    def direct(self) -> bool:
        """Whether reads bypass the page cache."""
        return self._reader.direct

    @property
    def read_bytes(self) -> int:
        """See :class:`Transfer`."""
        return self._reader.read_bytes

    # ---- demand ----------------------------------------------------------------------

    def read(self, requests: Requests) -> None:
        """:meth:`begin_read` and :meth:`end_read`."""
        self.end_read(self.begin_read(requests))

    def begin_read(self, requests: Requests) -> PendingRead[Flight]:
        """See :class:`Transfer`."""
        pending = PendingRead(self._flights.register(requests, is_prefetch=False))
        try:
            self._submit_pending(pending)
        except NativeError:
            self._end_all_reads()
            self._flights.forget(pending.flights)
            raise
        return pending

    def end_read(self, pending: PendingRead[Flight]) -> None:
        """See :class:`Transfer`."""
        try:
            self._complete(pending)
        except BaseException:
            self._end_all_reads()
            raise
        finally:
            self._flights.forget(pending.flights)
        raise_for_errors(pending.flights)

    def promote(self, slot: int) -> None:
        """See :class:`Transfer`."""
        flight = self._flights.prefetch_into(slot)
        if not flight.has_ended:
            self._reader.promote(flight.ticket)

    def await_slot(self, slot: int) -> None:
        """See :class:`Transfer`."""
        self.promote(slot)
        flight = self._flights.prefetch_into(slot)
        try:
            while not flight.has_ended:
                self._collect(_WAIT_MS)
        except BaseException:
            self._end_all_reads()
            raise
        self._flights.tell(flight, self.read)

    # ---- prefetch --------------------------------------------------------------------

    def prefetch(self, requests: Requests) -> int:
        """See :class:`Transfer`."""
        most = max(len(self._reader.free_tickets) - self._tickets_for_demand, 0)
        flights = self._flights.register(requests[:most], is_prefetch=True)
        if flights:
            try:
                self._submit(flights, PREFETCH)
            except NativeError:
                self._flights.forget(flights)
                raise
        return len(flights)

    @property
    def has_news(self) -> bool:
        """See :class:`Transfer`."""
        return self._flights.has_unreported or (
            bool(self._by_ticket) and self._reader.has_ended
        )

    def poll(self) -> list[Flight]:
        """See :class:`Transfer`."""
        if self._by_ticket:
            self._collect(0)
        return self._flights.report()

    def drop(self, slot: int) -> bool:
        """See :class:`Transfer`."""
        flight = self._flights.prefetch_into(slot)
        if flight.state is not State.READING:
            return False
        if not self._reader.drop(flight.ticket):
            flight.enter(State.UNWANTED)
            return False
        del self._by_ticket[flight.ticket]
        flight.enter(State.DROPPED)
        self._flights.forget([flight])
        return True

    def drain(self) -> None:
        """See :class:`Transfer`."""
        while self._by_ticket:
            self._collect(_WAIT_MS)

    def await_any(self) -> None:
        """Waits a while until :meth:`poll` has something to report, if anything is read."""
        if self._by_ticket and not self._flights.has_unreported:
            try:
                self._collect(_WAIT_MS)
            except BaseException:
                self._end_all_reads()
                raise

    def close(self) -> None:
        """See :class:`Transfer`."""
        self._reader.close()
        self._by_ticket.clear()
        self._flights.close()

    # ---- flights -----------------------------------------------------------------------

    def _submit_pending(self, pending: PendingRead[Flight]) -> None:
        """Submits as many as there are tickets for."""
        num_tickets = len(self._reader.free_tickets)
        if num_tickets and pending.num_submitted < len(pending.flights):
            begin = pending.num_submitted
            batch = pending.flights[begin : begin + num_tickets]
            self._submit(batch, DEMAND)
            pending.num_submitted += len(batch)

    def _complete(self, pending: PendingRead[Flight]) -> None:
        """Submits the rest, as tickets come back, and waits for all."""
        flights = pending.flights
        while True:
            self._submit_pending(pending)
            running = [f for f in flights[: pending.num_submitted] if not f.has_ended]
            if not running:
                return
            # To be woken for every read would take the cores from reading. But what is left
            # to be submitted, or to be checked, should not wait for the last one.
            wait_for_all = pending.num_submitted == len(flights) and not any(
                self._reader.needs_check(flight.ticket) for flight in running
            )
            self._collect(_WAIT_MS, len(running) if wait_for_all else 1)

    def _submit(self, flights: Sequence[Flight], priority: int) -> None:
        records = [(flight.layer, flight.expert, flight.slot) for flight in flights]
        for flight, ticket in zip(flights, self._reader.submit(records, priority), strict=True):
            flight.enter(State.READING)
            flight.ticket = ticket
            self._by_ticket[ticket] = flight

    def _collect(self, timeout_ms: int, min_count: int = 1) -> bool:
        """Notes what ended, waiting up to ``timeout_ms`` for ``min_count``; whether any did."""
        any_ended = False
        for ticket, error in self._reader.wait(timeout_ms, min_count):
            self._end(self._by_ticket.pop(ticket), error)
            any_ended = True
        return any_ended

    def _end(self, flight: Flight, reason: str | None) -> None:
        if reason is None:
            self._flights.end(flight, State.LANDED)
        elif flight.state is State.UNWANTED:
            self._flights.end(flight, State.DROPPED)
        else:
            self._flights.end(flight, State.FAILED, self._explain(flight, reason))

    def _end_all_reads(self) -> None:
        """A signal interrupted a call: no read may write into a slot that it gives up."""
        while self._collect(-1):
            pass
        # Left are those that the interrupted wait had taken already.
        for flight in self._by_ticket.values():
            self._end(flight, "the wait for it was interrupted")
        self._by_ticket.clear()
        self._reader.reclaim_tickets()

    def _explain(self, flight: Flight, reason: str) -> str:
        store, layer = self._store.store_of(flight.layer)
        return (
            f"cannot read expert {flight.expert} of layer {layer} from {store.path} "
            f"(byte {store.record_offset(layer, flight.expert)}): {reason}; start the "
            "server again, which builds a damaged store again, and look at the disk if this "
            "comes again"
        )
