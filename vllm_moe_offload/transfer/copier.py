"""What DeviceTransfer asks of whoever moves bytes from host memory into device slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

DEMAND_LANE, PREFETCH_LANE = 0, 1
"""Two queues of copies beside the compute stream. In each, copies run in order."""


class Copier(Protocol):
    """Copies records from slots of the host tier into slots of the pool, asynchronously.

    A *ticket* stands for all copies of one :meth:`copy` and is valid until :meth:`release`.
    Every method raises an exception that names call and code if the device reports an error;
    nothing is tried again.

    Attributes:
        num_slots: slots of the pool.
    """

    num_slots: int

    def copy(self, lane: int, pairs: Sequence[tuple[int, int]]) -> int:
        """Queues copies of ``(host slot, device slot)``, at least one; returns their ticket.

        On an error nothing of the call is under way any more.
        """

    def done(self, ticket: int) -> bool:
        """Whether all copies of the ticket are complete; does not wait."""

    def wait_on_host(self, ticket: int) -> None:
        """Returns when all copies of the ticket are complete."""

    def join(self, ticket: int) -> None:
        """What is launched on the compute stream from now on waits for the ticket's copies.

        The host does not wait.
        """

    def release(self, ticket: int) -> None:
        """The ticket will not be used again; its copies and joins stay queued."""

    def after_compute(self) -> None:
        """Copies queued from now on wait for what was launched on the compute stream so far.

        Kernels launched before may still read slots that the planner has given away since.
        """

    def close(self) -> None:
        """Waits for all copies and frees what they need; safe to repeat."""
