"""How reads end: errors of demands, reports of prefetches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class TransferError(RuntimeError):
    """Experts could not be read; the message names file, expert, reason and remedy.

    Attributes:
        succeeded_slots: slots of the same call that hold their experts.
        failed_slots: slots of the same call whose content is undefined. No read writes into
            them any more.
    """

    def __init__(
        self,
        message: str,
        succeeded_slots: Iterable[int] = (),
        failed_slots: Iterable[int] = (),
    ) -> None:
        super().__init__(message)
        self.succeeded_slots = list(succeeded_slots)
        self.failed_slots = list(failed_slots)


@dataclass(frozen=True, slots=True)
class FinishedPrefetch:
    """A prefetch that ended; its slot is no longer in flight.

    Attributes:
        layer, expert: what was read.
        slot: where to.
        error: why ``slot`` does not hold it; None if it does.
        dropped: nobody wanted it any more: an error is none then.
    """

    layer: int
    expert: int
    slot: int
    error: str | None
    dropped: bool = False

    @property
    def ok(self) -> bool:
        """Whether the slot holds the expert."""
        return self.error is None
