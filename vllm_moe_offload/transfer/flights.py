"""Flights: what is on its way into which slot, how far it is, and how its end is told.

A slot is *in flight* from the call that asks for it until its end was reported (by the same
call, ``poll`` or ``await_slot``) or ``drop`` freed it at once. The page table goes by the same
rule, so that an expert in flight is never fetched or evicted twice; asking for that is an error
here. The states of a flight, whatever its transfer; what is not drawn is an error::

    asked for
        |        +---- its bytes are in host memory ----+
        v        v                                      |
       WAITING -------- given to the file reader ----> READING -----> LANDED, FAILED
        |  |                                            |  | ^
        |  |                                            |  | | wanted again, and read on
        |  +----------> DROPPED <--- not all was read --+  v |
        |                  ^                            UNWANTED ---> LANDED: it was too late
        |                  +------ not all was read -------+
        |
        +---- given to the copy engine ----> COPYING ---> LANDED
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Generic, TypeVar

Requests = Sequence[tuple[int, int, int]]
"""Layer, expert and slot of each expert that is to be brought in."""


class TransferError(RuntimeError):
    """Experts could not be read; the message names file, expert, reason and remedy.

    The slots of the same call are free, their content is undefined, and no read writes into
    them any more.
    """


class State(Enum):
    """How far a flight is; the picture above has the ways between."""

    WAITING = auto()
    """For its turn; nobody writes into its slot."""
    READING = auto()
    """Given to the file reader; threads write, into its slot or its host slot."""
    UNWANTED = auto()
    """As READING, and dropped: threads end what they have begun."""
    COPYING = auto()
    """Given to the copy engine, which writes into its slot until the end."""
    LANDED = auto()
    """Kernels that are launched from now on find the expert in the slot."""
    FAILED = auto()
    """It could not be read."""
    DROPPED = auto()
    """Nobody wanted it before all of it had arrived; the content of the slot is undefined."""


_ENDS = (State.LANDED, State.FAILED, State.DROPPED)
_NEXT = {
    State.WAITING: (State.READING, State.COPYING, State.DROPPED),
    State.READING: (State.WAITING, State.UNWANTED, *_ENDS),
    State.UNWANTED: (State.READING, State.LANDED, State.DROPPED),
    State.COPYING: (State.LANDED,),
    **dict.fromkeys(_ENDS, ()),
}


@dataclass(slots=True, eq=False)
class Flight:
    """One expert on its way into one slot.

    Attributes:
        layer, expert, slot: what, and where to.
        is_prefetch: whether its end is reported by ``poll``.
        state: how far it is; changed by :meth:`enter` alone.
        error: why it FAILED; for people.
        ticket: of the file reader while READING or UNWANTED, in a transfer into memory.
    """

    layer: int
    expert: int
    slot: int
    is_prefetch: bool
    state: State = State.WAITING
    error: str | None = None
    ticket: int = -1

    def enter(self, state: State) -> None:
        """Goes on to ``state``; RuntimeError if no way leads there."""
        if state not in _NEXT[self.state]:
            raise RuntimeError(
                f"expert {self.expert} of layer {self.layer} on its way into slot {self.slot} "
                f"cannot go from {self.state.name} to {state.name}"
            )
        self.state = state

    @property
    def has_ended(self) -> bool:
        """Whether nothing writes into the slot any more, and nothing will."""
        return self.state in _ENDS


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
        self._is_closed = False
        self._flight_type = flight_type
        self._num_layers = num_layers
        self._num_experts = num_experts
        self._num_slots = num_slots
        self._by_slot: dict[int, FlightT] = {}
        self._experts: set[tuple[int, int]] = set()
        self._unreported: list[FlightT] = []  # prefetches that ended

    @property
    def has_unreported(self) -> bool:
        """Whether prefetches ended that were not reported."""
        return bool(self._unreported)

    def register(self, requests: Requests, *, is_prefetch: bool) -> list[FlightT]:
        """Puts ``requests`` in flight: all, or none and a ValueError."""
        if self._is_closed:
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

    def prefetch_into(self, slot: int) -> FlightT:
        """The prefetch into ``slot``; ValueError if there is none."""
        flight = self._by_slot.get(slot)
        if flight is None:
            raise ValueError(f"slot {slot} is not in flight")
        if not flight.is_prefetch:
            raise ValueError(f"slot {slot} is in flight for a demand, not for a prefetch")
        return flight

    def end(self, flight: FlightT, state: State, error: str | None = None) -> None:
        """The flight ended in ``state``; a prefetch waits to be reported."""
        flight.enter(state)
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

    def tell(self, flight: FlightT, read: Callable[[Requests], None]) -> None:
        """The end of an awaited prefetch; one that was dropped before is read with ``read``."""
        self.take(flight)
        if flight.state is State.DROPPED:
            read([(flight.layer, flight.expert, flight.slot)])
        raise_for_errors([flight])

    def report(self) -> list[FlightT]:
        """Prefetches that ended and were not reported yet; they are not in flight any more."""
        ended, self._unreported = self._unreported, []
        self.forget(ended)
        return ended

    def close(self) -> None:
        """Forgets everything and takes no more."""
        self._is_closed = True
        self.forget(list(self._by_slot.values()))
        self._unreported.clear()


def raise_for_errors(flights: Sequence[Flight]) -> None:
    """One TransferError for all flights of a call that FAILED, if any did."""
    failed = [flight for flight in flights if flight.state is State.FAILED]
    if not failed:
        return
    message = str(failed[0].error)
    if len(failed) > 1:
        message += f" ({len(failed)} of {len(flights)} experts failed, this one first)"
    raise TransferError(message)
