"""Prefetches onto a device: read if they must be, waiting for their turn, copied."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from vllm_moe_offload.transfer.copier import DEMAND_LANE, PREFETCH_LANE, Copier
from vllm_moe_offload.transfer.flights import Flight, Flights, State
from vllm_moe_offload.transfer.host_copies import Copies, DeviceFlight, HostCopies
from vllm_moe_offload.transfer.host_tier import HostTier


class DevicePrefetches:
    """All prefetches of one transfer; those that ended wait in ``flights``.

    Attributes:
        max_queued: copies that the device may have at a time.
    """

    def __init__(
        self,
        host: HostTier,
        copier: Copier,
        copies: HostCopies,
        flights: Flights[DeviceFlight],
        max_queued: int,
    ) -> None:
        self._host = host
        self._copier = copier
        self._copies = copies
        self._flights = flights
        self.max_queued = max_queued
        # Prefetches must leave host slots to demands.
        self._max_under_way = host.num_slots if host.holds_everything else host.num_slots // 2
        self._reading: dict[int, DeviceFlight] = {}  # by host slot
        self._waiting: deque[DeviceFlight] = deque()
        self._copying: list[DeviceFlight] = []

    @property
    def num_under_way(self) -> int:
        """Prefetches that did not end."""
        return len(self._reading) + len(self._waiting) + len(self._copying)

    @property
    def any_ended(self) -> bool:
        """Whether :meth:`take_in` would note anything."""
        return (bool(self._reading) and self._host.files.has_news) or any(
            self._is_copied(flight) for flight in self._copying
        )

    def begin(self, flight: DeviceFlight) -> bool:
        """Has it read or waiting; False if that is too much now."""
        if self.num_under_way >= self._max_under_way:
            return False
        host = self._host
        slot = host.slots.find(flight.layer, flight.expert)
        if slot is not None:
            flight.host_slot = slot
            self._waiting.append(flight)
            return True
        slot = host.slots.reserve(flight.layer, flight.expert)
        if slot is None:
            return False
        begun = 0
        try:
            begun = host.files.prefetch([(flight.layer, flight.expert, slot)])
        finally:
            if not begun:
                host.slots.abandon(slot)
        if begun:
            flight.enter(State.READING)
            flight.host_slot = slot
            self._reading[slot] = flight
        return bool(begun)

    def queue(self) -> None:
        """Gives the device copies, as many as it may have at a time."""
        while self._waiting and len(self._copying) < self.max_queued:
            self._copy(self._waiting[0], PREFETCH_LANE)

    def _copy(self, flight: DeviceFlight, lane: int) -> None:
        flight.copies = self._copies.copy(lane, [flight])
        self._waiting.remove(flight)
        self._copying.append(flight)

    def take_in(self) -> None:
        """Notes which reads and copies ended."""
        if self._reading:
            for ended in self._host.files.poll():
                self._end_reading(ended)
        for flight in list(self._copying):
            if self._is_copied(flight):
                self._copying.remove(flight)
                self._copies.release(_copies_of(flight))
                self._flights.end(flight, State.LANDED)

    def _is_copied(self, flight: DeviceFlight) -> bool:
        return flight.copies is not None and self._copier.done(flight.copies.ticket)

    def _end_reading(self, ended: Flight) -> None:
        flight = self._reading.pop(ended.slot)
        wanted = flight.state is State.READING
        if ended.state is State.LANDED:
            self._host.slots.arrived(ended.slot)
            if wanted:
                flight.enter(State.WAITING)
                self._waiting.append(flight)
                if flight.promoted:
                    self._copy(flight, DEMAND_LANE)
                return
            self._host.slots.release(ended.slot)
        else:
            self._host.slots.abandon(ended.slot)
        flight.host_slot = -1
        self._flights.end(flight, ended.state if wanted else State.DROPPED, ended.error)

    def promote(self, flight: DeviceFlight) -> None:
        """Gives it a demand's priority."""
        if flight.state is State.UNWANTED:
            flight.enter(State.READING)  # it may turn out to have been cut short
        if flight.state is State.READING:
            flight.promoted = True
            self._host.files.promote(flight.host_slot)
        elif flight.state is State.WAITING:
            self._copy(flight, DEMAND_LANE)

    def join(self, flight: DeviceFlight) -> bool:
        """Waits for its read and has kernels wait for its copy; False if it ended already.

        True: it is nobody's any more, and to be forgotten.
        """
        self.promote(flight)
        while flight.state is State.READING:
            self._host.files.await_any()
            self.take_in()
        if flight.has_ended:
            return False
        assert flight.copies is not None
        self._copier.join(flight.copies.ticket)
        self._copying.remove(flight)
        self._copies.depart([_copies_of(flight)])
        flight.enter(State.LANDED)
        return True

    def drop(self, flight: DeviceFlight) -> bool:
        """See :class:`Transfer`."""
        if flight.state is State.WAITING:
            self._waiting.remove(flight)
            self._host.slots.release(flight.host_slot)
        elif flight.state is not State.READING:
            return False
        elif self._host.files.drop(flight.host_slot):
            del self._reading[flight.host_slot]
            self._host.slots.abandon(flight.host_slot)
        else:
            flight.enter(State.UNWANTED)
            return False
        flight.host_slot = -1
        flight.enter(State.DROPPED)
        self._flights.forget([flight])
        return True

    def advance(self) -> None:
        """Waits until some prefetch got on; there must be one under way."""
        self.queue()
        if self._copying:
            copies = self._copying[0].copies
            assert copies is not None
            self._copier.wait_on_host(copies.ticket)
        else:
            self._host.files.await_any()
        self.take_in()

    def withdraw(self, flights: Sequence[DeviceFlight]) -> None:
        """The call that began them fails: they end, and are to be forgotten, unheard of."""
        for flight in flights:
            if not self.drop(flight):
                while not flight.has_ended:
                    self.advance()
                self._flights.take(flight)

    def close(self) -> None:
        """Forgets them all."""
        self._reading.clear()
        self._waiting.clear()
        self._copying.clear()


def _copies_of(flight: DeviceFlight) -> Copies:
    """What copies the flight, no longer its own."""
    copies = flight.copies
    assert copies is not None
    flight.copies = None
    return copies
