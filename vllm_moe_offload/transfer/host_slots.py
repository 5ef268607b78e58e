"""Which expert lies in which slot of the host tier, and whose turn it is to leave.

Least recently used. Not an ExpertCache: there, experts are pinned from a plan to its end, one
plan at a time; here a slot is *held* as long as a read into it or copies from it are under way,
however many calls that spans.
"""

from __future__ import annotations

from collections import OrderedDict


class HostSlots:
    """Slots and their experts; bytes are somebody else's."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots - 1, -1, -1))
        self._slots: OrderedDict[tuple[int, int], int] = OrderedDict()  # oldest use first
        self._experts: dict[int, tuple[int, int]] = {}  # of slots not free
        self._holds = [0] * num_slots

    def find(self, layer: int, expert: int) -> int | None:
        """The slot that holds the expert, now held once more; None if none does."""
        slot = self._slots.get((layer, expert))
        if slot is not None:
            self._slots.move_to_end((layer, expert))
            self._holds[slot] += 1
        return slot

    def reserve(self, layer: int, expert: int) -> int | None:
        """A slot for an absent expert, held once; None if all slots are held.

        Followed by :meth:`arrived` or :meth:`abandon`; until then the expert is not found.
        """
        if not self._free:
            victim = next(
                (key for key, slot in self._slots.items() if not self._holds[slot]), None
            )
            if victim is None:
                return None
            slot = self._slots.pop(victim)
            del self._experts[slot]
            self._free.append(slot)
        slot = self._free.pop()
        self._experts[slot] = (layer, expert)
        self._holds[slot] = 1
        return slot

    def arrived(self, slot: int) -> None:
        """A reserved slot has its bytes; it stays held."""
        self._slots[self._experts[slot]] = slot

    def abandon(self, slot: int) -> None:
        """A reserved slot will not get its bytes: it is free."""
        del self._experts[slot]
        self._holds[slot] = 0
        self._free.append(slot)

    def release(self, slot: int) -> None:
        """One that held ``slot`` reads it no more."""
        self._holds[slot] -= 1

    @property
    def num_held(self) -> int:
        """Slots that are held."""
        return sum(holds > 0 for holds in self._holds)
