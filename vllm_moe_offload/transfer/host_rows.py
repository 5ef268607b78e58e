"""Which expert lies in which row of the host tier, and whose turn it is to leave.

Least recently used. Not an ExpertCache: there, experts are pinned from a plan to its end, one
plan at a time; here a row is *held* as long as a read into it or copies from it are under way,
however many calls that spans.
"""

from __future__ import annotations

from collections import OrderedDict


class HostRows:
    """Rows and their experts; bytes are somebody else's."""

    def __init__(self, num_rows: int) -> None:
        self._free = list(range(num_rows - 1, -1, -1))
        self._rows: OrderedDict[tuple[int, int], int] = OrderedDict()  # oldest use first
        self._experts: dict[int, tuple[int, int]] = {}  # of rows not free
        self._holds = [0] * num_rows

    def find(self, layer: int, expert: int) -> int | None:
        """The row that holds the expert, now held once more; None if none does."""
        row = self._rows.get((layer, expert))
        if row is not None:
            self._rows.move_to_end((layer, expert))
            self._holds[row] += 1
        return row

    def reserve(self, layer: int, expert: int) -> int | None:
        """A row for an absent expert, held once; None if all rows are held.

        Followed by :meth:`arrived` or :meth:`abandon`; until then the expert is not found.
        """
        if not self._free:
            victim = next(
                (key for key, row in self._rows.items() if not self._holds[row]), None
            )
            if victim is None:
                return None
            row = self._rows.pop(victim)
            del self._experts[row]
            self._free.append(row)
        row = self._free.pop()
        self._experts[row] = (layer, expert)
        self._holds[row] = 1
        return row

    def arrived(self, row: int) -> None:
        """A reserved row has its bytes; it stays held."""
        self._rows[self._experts[row]] = row

    def abandon(self, row: int) -> None:
        """A reserved row will not get its bytes: it is free."""
        del self._experts[row]
        self._holds[row] = 0
        self._free.append(row)

    def release(self, row: int) -> None:
        """One that held ``row`` reads it no more."""
        self._holds[row] -= 1

    @property
    def num_held(self) -> int:
        """Rows that are held."""
        return sum(holds > 0 for holds in self._holds)
