"""What the runtime and the prefetcher ask of a transfer, whatever lies behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from vllm_moe_offload.transfer.flights import Flight, PendingRead, Requests


class Transfer(Protocol):
    """Brings experts into slots: :class:`TransferEngine` into memory, :class:`DeviceTransfer`
    onto a device. For one thread at a time: the model runner's.

    A slot that was reported as holding its expert may be read by every kernel that is launched
    afterwards; on a device its bytes may still be on their way then, and the kernel waits.
    Where bringing in a demand fails, whatever is raised, nothing writes into its slots any more.

    Attributes:
        expert_ns: what bringing in one expert takes, where the transfer knows; None: what a
            clock around :meth:`begin_read` and :meth:`end_read` says is right.
        max_queued_prefetches: most prefetches that a copy engine has at a time, which works in
            order; may be set at any time. Without meaning where nothing is copied.
    """

    expert_ns: float | None
    max_queued_prefetches: int

    @property
    def read_bytes(self) -> int:
        """Bytes of experts brought in since the start."""

    @property
    def has_news(self) -> bool:
        """Whether :meth:`poll` would report or note anything; costs next to nothing."""

    def begin_read(self, requests: Requests) -> PendingRead[Any]:
        """Begins to bring in experts, of any number, before everything else.

        Raises:
            ValueError: a slot or expert is in flight, twice in the call, or does not exist;
                nothing was begun.
        """

    def end_read(self, pending: PendingRead[Any]) -> None:
        """Returns when kernels may be launched on the slots.

        Raises:
            TransferError: some could not be read.
        """

    def prefetch(self, requests: Requests) -> int:
        """Brings in experts, the most urgent first, when no demand waits; returns at once.

        Called after the demands of a layer call, and with none to be asked for too: then it
        goes on with those asked for before, so that no prefetch gets in front of a demand.

        Returns:
            How many are in flight now, from the front: what is under way is limited.

        Raises:
            ValueError: as :meth:`begin_read`.
        """

    def promote(self, slot: int) -> None:
        """Gives the prefetch into ``slot`` a demand's priority.

        Raises:
            ValueError: no prefetch into ``slot`` is in flight.
        """

    def await_slot(self, slot: int) -> None:
        """As :meth:`end_read`, for the prefetch into ``slot``, which :meth:`poll` reports no
        more. One that was dropped and did not land is read again.

        Raises:
            TransferError: the expert could not be read.
            ValueError: no prefetch into ``slot`` is in flight.
        """

    def poll(self) -> Sequence[Flight]:
        """Prefetches that ended and were not reported yet: their slots are not in flight any
        more. Does not wait."""

    def drop(self, slot: int) -> bool:
        """Ends the prefetch into ``slot`` as soon as possible.

        Returns:
            True if ``slot`` is free now, and unchanged. False if its end will be reported:
            something writes into the slot.

        Raises:
            ValueError: no prefetch into ``slot`` is in flight.
        """

    def drain(self) -> None:
        """Waits until no prefetch is under way; :meth:`poll` reports them."""

    def close(self) -> None:
        """Waits for what runs, drops the rest; safe to repeat."""
