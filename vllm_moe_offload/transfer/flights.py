"""Flights: what is on its way into which slot, and how its end is told.

A slot is *in flight* from the call that asks for it until its end was reported (by the same
call, ``poll`` or ``await_slot``) or it was cancelled. The page table goes by the same rule, so
that an expert in flight is never fetched or evicted twice; asking for that is an error here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from vllm_moe_offload.transfer.outcome import FinishedPrefetch, TransferError


@dataclass(slots=True, eq=False)
class Flight:
    """One expert on its way into one slot.

    Attributes:
        layer, expert, slot: what, and where to.
        is_prefetch: whether its end is reported by ``poll``.
        ticket: of whoever moves the bytes; -1: nobody does, or not any more.
        done: it ended.
        error: why ``slot`` does not hold the expert; for people.
        dropped: nobody wanted it any more.
    """

    layer: int
    expert: int
    slot: int
    is_prefetch: bool
    ticket: int = -1
    done: bool = False
    error: str | None = None
    dropped: bool = False


FlightT = TypeVar("FlightT", bound=Flight)


@dataclass(slots=True)
class PendingRead(Generic[FlightT]):
    """Reads between ``begin_read`` and ``end_read``."""

    flights: list[FlightT]
    num_submitted: int = 0


class Flights(Generic[FlightT]):
    """All flights of one transfer, by slot."""

    def __init__(
        self, flight_type: type[FlightT], num_layers: int, num_experts: int, num_slots: int
    ) -> None:
        self.is_closed = False
        self._flight_type = flight_type
        self._num_layers = num_layers
        self._num_experts = num_experts
        self._num_slots = num_slots
        self._by_slot: dict[int, FlightT] = {}
        self._experts: set[tuple[int, int]] = set()
        self._unreported: list[FlightT] = []  # prefetches that ended

    @property
    def slots(self) -> list[int]:
        """Slots in flight."""
        return list(self._by_slot)

    @property
    def has_unreported(self) -> bool:
        """Whether prefetches ended that were not reported."""
        return bool(self._unreported)

    def register(
        self, requests: Sequence[tuple[int, int, int]], *, is_prefetch: bool
    ) -> list[FlightT]:
        """Puts ``(layer, expert, slot)`` in flight: all, or none and a ValueError."""
        if self.is_closed:
            raise ValueError("the transfer is closed")
        flights: list[FlightT] = []
        try:
            for layer, expert, slot in requests:
                self._check(layer, expert, slot)
                flight = self._flight_type(layer, expert, slot, is_prefetch)
                self._by_slot[slot] = flight
                self._experts.add((layer, expert))
                flights.append(flight)
        except ValueError:
            self.forget(flights)
            raise
        return flights

    def _check(self, layer: int, expert: int, slot: int) -> None:
        if not (0 <= layer < self._num_layers and 0 <= expert < self._num_experts):
            raise ValueError(f"there is no expert {expert} in layer {layer}")
        if not 0 <= slot < self._num_slots:
            raise ValueError(f"slot {slot} is outside [0, {self._num_slots})")
        if slot in self._by_slot:
            other = self._by_slot[slot]
            raise ValueError(
                f"slot {slot} is in flight for expert {other.expert} of layer {other.layer}: "
                f"expert {expert} of layer {layer} cannot be read into it"
            )
        if (layer, expert) in self._experts:
            raise ValueError(f"expert {expert} of layer {layer} is in flight to another slot")

    def into(self, slot: int) -> FlightT:
        """The flight into ``slot``; ValueError if there is none."""
        flight = self._by_slot.get(slot)
        if flight is None:
            raise ValueError(f"slot {slot} is not in flight")
        return flight

    def end(self, flight: FlightT, error: str | None) -> None:
        """The flight ended; a prefetch waits to be reported."""
        flight.ticket = -1
        flight.done = True
        flight.error = error
        if flight.is_prefetch:
            self._unreported.append(flight)

    def forget(self, flights: Iterable[FlightT]) -> None:
        """The flights are not in flight any more."""
        for flight in flights:
            del self._by_slot[flight.slot]
            self._experts.discard((flight.layer, flight.expert))

    def take(self, flight: FlightT) -> None:
        """The caller reports the end of this prefetch itself."""
        self._unreported.remove(flight)
        self.forget([flight])

    def report(self) -> list[FinishedPrefetch]:
        """Prefetches that ended and were not reported yet; they are not in flight any more."""
        ended, self._unreported = self._unreported, []
        self.forget(ended)
        return [
            FinishedPrefetch(
                flight.layer,
                flight.expert,
                flight.slot,
                flight.error,
                flight.dropped and flight.error is not None,
            )
            for flight in ended
        ]

    def close(self) -> None:
        """Forgets everything and takes no more."""
        self.is_closed = True
        self.forget(list(self._by_slot.values()))
        self._unreported.clear()


def raise_for_errors(flights: Sequence[Flight]) -> None:
    """One TransferError for all flights of a call that failed, if any did."""
    failed = [flight for flight in flights if flight.error is not None]
    if not failed:
        return
    message = str(failed[0].error)
    if len(failed) > 1:
        message += f" ({len(failed)} of {len(flights)} experts failed, this one first)"
    raise TransferError(
        message,
        [flight.slot for flight in flights if flight.error is None],
        [flight.slot for flight in failed],
    )
