"""Prefetches onto a device: read if they must be, waiting for their turn, copied."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from vllm_moe_offload.transfer.copier import DEMAND_LANE, PREFETCH_LANE, Copier
from vllm_moe_offload.transfer.flights import Flights
from vllm_moe_offload.transfer.host_copies import Copies, DeviceFlight, HostCopies
from vllm_moe_offload.transfer.host_tier import HostTier
from vllm_moe_offload.transfer.outcome import FinishedPrefetch


class Stage(Enum):
    """How far a prefetch is."""

    DEMAND = auto()  # not a prefetch
    READING = auto()  # from the file into its host slot
    WAITING = auto()  # in its host slot
    COPYING = auto()
    ENDED = auto()


@dataclass(slots=True, eq=False)
class StagedFlight(DeviceFlight):
    """A demand or a prefetch; what is added here is for prefetches."""

    stage: Stage = Stage.DEMAND
    promoted: bool = False
    copies: Copies | None = None


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
        flights: Flights[StagedFlight],
        max_queued: int,
    ) -> None:
        self._host = host
        self._copier = copier
        self._copies = copies
        self._flights = flights
        self.max_queued = max_queued
        # Prefetches must leave host slots to demands.
        self._max_under_way = host.num_slots if host.holds_everything else host.num_slots // 2
        self._reading: dict[int, StagedFlight] = {}  # by host slot
        self._waiting: deque[StagedFlight] = deque()
        self._copying: list[StagedFlight] = []

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

    def begin(self, flight: StagedFlight) -> bool:
        """Has it read or waiting; False if that is too much now."""
        if self.num_under_way >= self._max_under_way:
            return False
        host = self._host
        slot = host.slots.find(flight.layer, flight.expert)
        if slot is not None:
            flight.host_slot = slot
            self._wait(flight)
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
            flight.host_slot = slot
            flight.stage = Stage.READING
            self._reading[slot] = flight
        return bool(begun)

    def _wait(self, flight: StagedFlight) -> None:
        flight.stage = Stage.WAITING
        self._waiting.append(flight)

    def queue(self) -> None:
        """Gives the device copies, as many as it may have at a time."""
        while self._waiting and len(self._copying) < self.max_queued:
            self._copy(self._waiting[0], PREFETCH_LANE)

    def _copy(self, flight: StagedFlight, lane: int) -> None:
        flight.copies = self._copies.copy(lane, [flight])
        flight.stage = Stage.COPYING
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
                self._end(flight, None)

    def _is_copied(self, flight: StagedFlight) -> bool:
        return flight.copies is not None and self._copier.done(flight.copies.ticket)

    def _end_reading(self, ended: FinishedPrefetch) -> None:
        flight = self._reading.pop(ended.slot)
        if not ended.ok:
            self._host.slots.abandon(ended.slot)
            flight.host_slot = -1
            flight.dropped |= ended.dropped
            self._end(flight, ended.error)
            return
        self._host.slots.arrived(ended.slot)
        self._wait(flight)
        if flight.dropped:
            self._leave_queue(flight)
            self._end(flight, "nobody wanted it any more before it was copied")
        elif flight.promoted:
            self._copy(flight, DEMAND_LANE)

    def _leave_queue(self, flight: StagedFlight) -> None:
        self._waiting.remove(flight)
        self._host.slots.release(flight.host_slot)
        flight.host_slot = -1

    def _end(self, flight: StagedFlight, error: str | None) -> None:
        flight.stage = Stage.ENDED
        self._flights.end(flight, error)

    def promote(self, flight: StagedFlight) -> None:
        """Gives it a demand's priority."""
        if flight.stage is Stage.ENDED:
            return  # if nobody wanted it, that is why
        flight.dropped = False  # unless it turns out to have been cut short
        if flight.stage is Stage.READING:
            flight.promoted = True
            self._host.files.promote(flight.host_slot)
        elif flight.stage is Stage.WAITING:
            self._copy(flight, DEMAND_LANE)

    def join(self, flight: StagedFlight) -> bool:
        """Waits for its read and has kernels wait for its copy; False if it ended already.

        True: it is nobody's any more, and to be forgotten.
        """
        self.promote(flight)
        while flight.stage is Stage.READING:
            self._host.files.await_any()
            self.take_in()
        if flight.stage is Stage.ENDED:
            return False
        assert flight.copies is not None
        self._copier.join(flight.copies.ticket)
        self._copying.remove(flight)
        self._copies.depart([_copies_of(flight)])
        return True

    def cancel(self, flight: StagedFlight) -> bool:
        """Takes it back if neither read nor copy has begun; then it is to be forgotten."""
        if flight.stage is Stage.READING and self._host.files.cancel(flight.host_slot):
            self._give_up_reading(flight)
            return True
        if flight.stage is Stage.WAITING:
            self._leave_queue(flight)
            return True
        return False

    def drop(self, flight: StagedFlight) -> bool:
        """As :meth:`cancel`, and ends a read that began; a queued copy ends by itself."""
        if flight.stage is not Stage.READING:
            return self.cancel(flight)
        if self._host.files.drop(flight.host_slot):
            self._give_up_reading(flight)
            return True
        flight.dropped = True
        return False

    def _give_up_reading(self, flight: StagedFlight) -> None:
        del self._reading[flight.host_slot]
        self._host.slots.abandon(flight.host_slot)
        flight.host_slot = -1

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

    def withdraw(self, flights: Sequence[StagedFlight]) -> None:
        """The call that began them fails: they end, and are to be forgotten, unheard of."""
        for flight in flights:
            if self.drop(flight):
                self._flights.forget([flight])
                continue
            while flight.stage is not Stage.ENDED:
                self.advance()
            self._flights.take(flight)

    def close(self) -> None:
        """Forgets them all."""
        self._reading.clear()
        self._waiting.clear()
        self._copying.clear()


def _copies_of(flight: StagedFlight) -> Copies:
    """What copies the flight, no longer its own."""
    copies = flight.copies
    assert copies is not None
    flight.copies = None
    return copies
