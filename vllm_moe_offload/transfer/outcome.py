"""How reads end: errors of demands, reports of prefetches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class TransferError(RuntimeError):
    """Experts could not be read; the message names file, expert, reason and remedy.

    Attributes:
        succeeded_rows: rows of the same call that hold their experts.
        failed_rows: rows of the same call whose content is undefined. No read writes into
            them any more.
    """

    def __init__(
        self,
        message: str,
        succeeded_rows: Iterable[int] = (),
        failed_rows: Iterable[int] = (),
    ) -> None:
        super().__init__(message)
        self.succeeded_rows = list(succeeded_rows)
        self.failed_rows = list(failed_rows)


@dataclass(frozen=True, slots=True)
class FinishedPrefetch:
    """A prefetch that ended; its row is no longer in flight.

    Attributes:
        layer, expert: what was read.
        row: where to.
        error: why ``row`` does not hold it; None if it does.
        dropped: nobody wanted it any more: an error is none then.
    """

    layer: int
    expert: int
    row: int
    error: str | None
    dropped: bool = False

    @property
    def ok(self) -> bool:
        """Whether the row holds the expert."""
        return self.error is None
