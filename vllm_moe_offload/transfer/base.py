"""What the runtime and the prefetcher ask of a transfer, whatever lies behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from vllm_moe_offload.transfer.flights import PendingRead
from vllm_moe_offload.transfer.outcome import FinishedPrefetch


class Transfer(Protocol):
    """Brings experts into slots: :class:`TransferEngine` into memory, :class:`DeviceTransfer`
    onto a device. For one thread at a time: the model runner's.

    A slot that was reported as holding its expert may be read by every kernel that is launched
    afterwards; on a device its bytes may still be on their way then, and the kernel waits.

    Attributes:
        read_ns: time that callers spent waiting.
        expert_ns: what bringing in one expert takes, where the transfer knows; None: what a
            clock around :meth:`begin_read` and :meth:`end_read` says is right.
        max_queued_prefetches: most prefetches that a copy engine has at a time, which works in
            order; may be set at any time. Without meaning where nothing is copied.
    """

    read_ns: int
    expert_ns: float | None
    max_queued_prefetches: int

    @property
    def read_bytes(self) -> int:
        """Bytes of experts brought in since the start."""

    @property
    def has_news(self) -> bool:
        """Whether :meth:`poll` would report or note anything; costs next to nothing."""

    def read(self, requests: Sequence[tuple[int, int, int]]) -> None:
        """:meth:`begin_read` and :meth:`end_read`."""

    def begin_read(self, requests: Sequence[tuple[int, int, int]]) -> PendingRead[Any]:
        """Begins to bring in ``(layer, expert, slot)`` before everything else."""

    def end_read(self, pending: PendingRead[Any]) -> None:
        """Returns when kernels may be launched on the slots; raises TransferError."""

    def prefetch(self, requests: Sequence[tuple[int, int, int]]) -> int:
        """Brings in experts when no demand waits; how many are in flight, from the front.

        Called after the demands of a layer call, and with none to be asked for too: then it
        goes on with those asked for before.
        """

    def promote(self, slot: int) -> None:
        """Gives the prefetch into ``slot`` a demand's priority."""

    def await_slot(self, slot: int) -> None:
        """As :meth:`end_read`, for the prefetch into ``slot``."""

    def poll(self) -> list[FinishedPrefetch]:
        """Prefetches that ended and were not reported yet; does not wait."""

    def cancel(self, slot: int) -> bool:
        """Drops the prefetch into ``slot`` if it has not begun; whether it did."""

    def drop(self, slot: int) -> bool:
        """As :meth:`cancel`, and goes on with one that began no longer than necessary."""

    def cancel_all(self) -> list[int]:
        """Drops all prefetches that have not begun; returns their slots."""

    def drain(self) -> None:
        """Waits until no prefetch is under way; :meth:`poll` reports them."""

    def close(self) -> None:
        """Ends everything; safe to repeat."""
