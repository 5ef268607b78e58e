"""Copies out of the host tier, and how long they hold its slots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_moe_offload.transfer.copier import Copier
from vllm_moe_offload.transfer.flights import Flight, State
from vllm_moe_offload.transfer.host_tier import HostTier


@dataclass(slots=True)
class Copies:
    """Copies under one ticket, and the host slots that they hold."""

    ticket: int
    host_slots: list[int]


@dataclass(slots=True, eq=False)
class DeviceFlight(Flight):
    """An expert on its way to a device.

    Attributes:
        host_slot: held for it while no copy does; -1: none is.
        copies: of a prefetch, while COPYING.
        promoted: a prefetch is a demand by now.
    """

    host_slot: int = -1
    copies: Copies | None = None
    promoted: bool = False


class HostCopies:
    """Queues copies; a host slot is held until the host saw its copies complete.

    Attributes:
        copied_bytes: of experts, queued so far.
    """

    def __init__(self, host: HostTier, copier: Copier) -> None:
        self.copied_bytes = 0
        self._host = host
        self._copier = copier
        self._expert_bytes = host.store.layout.expert_bytes
        self._departing: list[Copies] = []

    def copy(self, lane: int, flights: Sequence[DeviceFlight]) -> Copies:
        """Queues copies from the flights' host slots into their slots.

        The copies hold the host slots from now on, and the flights do not.
        """
        host_slots = [flight.host_slot for flight in flights]
        ticket = self._copier.copy(
            lane, [(flight.host_slot, flight.slot) for flight in flights]
        )
        for flight in flights:
            flight.enter(State.COPYING)
            flight.host_slot = -1
        self.copied_bytes += self._expert_bytes * len(flights)
        return Copies(ticket, host_slots)

    def release(self, copies: Copies) -> None:
        """The host saw the copies complete."""
        self._copier.release(copies.ticket)
        for slot in copies.host_slots:
            self._host.slots.release(slot)

    def depart(self, copies: Iterable[Copies]) -> None:
        """Kernels wait for the copies; the host has not seen them complete."""
        if self._host.holds_everything:  # no slot is ever used for another expert
            for each in copies:
                self.release(each)
        else:
            self._departing += copies

    def reap(self) -> None:
        """Gives back host slots of departed copies that are complete."""
        under_way = []
        for copies in self._departing:
            if self._copier.done(copies.ticket):
                self.release(copies)
            else:
                under_way.append(copies)
        self._departing = under_way

    def wait_for_one(self, others: list[Copies]) -> None:
        """Waits for the oldest departed copies or, without any, takes from ``others``.

        Raises:
            RuntimeError: there are none: whoever holds the host slots is unknown.
        """
        copies = self._departing or others
        if not copies:
            raise RuntimeError("all host slots are held, and no copy is under way")
        self._copier.wait_on_host(copies[0].ticket)
        self.release(copies.pop(0))

    def close(self) -> None:
        """Forgets what is under way."""
        self._departing.clear()
