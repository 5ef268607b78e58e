"""Flights: what is on its way into which row, and how its end is told.

A row is *in flight* from the call that asks for it until its end was reported (by the same
call, ``poll`` or ``await_row``) or it was cancelled. The page table goes by the same rule, so
that an expert in flight is never fetched or evicted twice; asking for that is an error here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from vllm_moe_offload.transfer.outcome import FinishedPrefetch, TransferError


@dataclass(slots=True, eq=False)
class Flight:
    """One expert on its way into one row.

    Attributes:
        layer, expert, row: what, and where to.
        is_prefetch: whether its end is reported by ``poll``.
        ticket: of whoever moves the bytes; -1: nobody does, or not any more.
        done: it ended.
        error: why ``row`` does not hold the expert; for people.
        dropped: nobody wanted it any more.
    """

    layer: int
    expert: int
    row: int
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
    """All flights of one transfer, by row."""

    def __init__(
        self, flight_type: type[FlightT], num_layers: int, num_experts: int, num_rows: int
    ) -> None:
        self.is_closed = False
        self._flight_type = flight_type
        self._num_layers = num_layers
        self._num_experts = num_experts
        self._num_rows = num_rows
        self._by_row: dict[int, FlightT] = {}
        self._experts: set[tuple[int, int]] = set()
        self._unreported: list[FlightT] = []  # prefetches that ended

    @property
    def rows(self) -> list[int]:
        """Rows in flight."""
        return list(self._by_row)

    @property
    def has_unreported(self) -> bool:
        """Whether prefetches ended that were not reported."""
        return bool(self._unreported)

    def register(
        self, requests: Sequence[tuple[int, int, int]], *, is_prefetch: bool
    ) -> list[FlightT]:
        """Puts ``(layer, expert, row)`` in flight: all, or none and a ValueError."""
        if self.is_closed:
            raise ValueError("the transfer is closed")
        flights: list[FlightT] = []
        try:
            for layer, expert, row in requests:
                self._check(layer, expert, row)
                flight = self._flight_type(layer, expert, row, is_prefetch)
                self._by_row[row] = flight
                self._experts.add((layer, expert))
                flights.append(flight)
        except ValueError:
            self.forget(flights)
            raise
        return flights

    def _check(self, layer: int, expert: int, row: int) -> None:
        if not (0 <= layer < self._num_layers and 0 <= expert < self._num_experts):
            raise ValueError(f"there is no expert {expert} in layer {layer}")
        if not 0 <= row < self._num_rows:
            raise ValueError(f"row {row} is outside [0, {self._num_rows})")
        if row in self._by_row:
            other = self._by_row[row]
            raise ValueError(
                f"row {row} is in flight for expert {other.expert} of layer {other.layer}: "
                f"expert {expert} of layer {layer} cannot be read into it"
            )
        if (layer, expert) in self._experts:
            raise ValueError(f"expert {expert} of layer {layer} is in flight to another row")

    def into(self, row: int) -> FlightT:
        """The flight into ``row``; ValueError if there is none."""
        flight = self._by_row.get(row)
        if flight is None:
            raise ValueError(f"row {row} is not in flight")
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
            del self._by_row[flight.row]
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
                flight.row,
                flight.error,
                flight.dropped and flight.error is not None,
            )
            for flight in ended
        ]

    def close(self) -> None:
        """Forgets everything and takes no more."""
        self.is_closed = True
        self.forget(list(self._by_row.values()))
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
        [flight.row for flight in flights if flight.error is None],
        [flight.row for flight in failed],
    )
