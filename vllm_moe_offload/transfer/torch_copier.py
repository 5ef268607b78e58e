"""Copies on two streams of a CUDA device, by torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_moe_offload.cache.pool import SlotPool
from vllm_moe_offload.transfer.copier import DEMAND_LANE, PREFETCH_LANE
from vllm_moe_offload.transfer.page_lock import PageLocked
from vllm_moe_offload.transfer.record_reader import Bytes


class TorchCopier:
    """A :class:`~vllm_moe_offload.transfer.copier.Copier`; errors are torch's.

    Attributes:
        num_slots: slots of the pool.
    """

    def __init__(self, pool: SlotPool, arena: Bytes, locked: PageLocked) -> None:
        """Keeps pool and arena alive.

        Args:
            pool: on a CUDA device; copies go to its slots.
            arena: uint8 ``[slots, record_bytes]``, contiguous; records of ``pool.layout``.
            locked: the arena; :meth:`close` closes it.

        Raises:
            ValueError: the arena holds other records.
        """
        layout = pool.layout
        if (
            arena.ndim != 2
            or arena.shape[1] != layout.record_bytes
            or not arena.flags.c_contiguous
        ):
            raise ValueError(
                f"the arena must be contiguous [slots, {layout.record_bytes}], got {arena.shape}"
            )
        self.num_slots = pool.num_slots
        self._locked = locked
        self._device = pool.device
        records = torch.from_numpy(arena)
        # Per tensor of an expert its rows of all records, and of all slots, as bytes.
        self._rows: list[tuple[torch.Tensor, torch.Tensor]] = []
        offset = 0
        for spec in (*layout.direct, *layout.tail):
            slots = pool.tensors[spec.name].view(pool.num_slots, -1).view(torch.uint8)
            self._rows.append((records[:, offset : offset + spec.nbytes], slots))
            offset += spec.nbytes
        self._lanes = {
            lane: torch.cuda.Stream(self._device) for lane in (DEMAND_LANE, PREFETCH_LANE)
        }
        self._events: dict[int, torch.cuda.Event] = {}
        self._num_tickets = 0

    def _compute_stream(self) -> torch.cuda.Stream:
        """That on which kernels are launched now: vLLM's worker changes it."""
        return torch.cuda.current_stream(self._device)

    def copy(self, lane: int, pairs: Sequence[tuple[int, int]]) -> int:
        """As :meth:`Copier.copy`."""
        stream = self._lanes[lane]
        try:
            with torch.cuda.stream(stream):
                for host_slot, slot in pairs:
                    for records, slots in self._rows:
                        slots[slot].copy_(records[host_slot], non_blocking=True)
        except BaseException:
            stream.synchronize()
            raise
        event = torch.cuda.Event()
        event.record(stream)
        self._num_tickets += 1
        self._events[self._num_tickets] = event
        return self._num_tickets

    def done(self, ticket: int) -> bool:
        """As :meth:`Copier.done`."""
        return self._events[ticket].query()

    def wait_on_host(self, ticket: int) -> None:
        """As :meth:`Copier.wait_on_host`."""
        self._events[ticket].synchronize()

    def join(self, ticket: int) -> None:
        """As :meth:`Copier.join`."""
        self._compute_stream().wait_event(self._events[ticket])

    def release(self, ticket: int) -> None:
        """As :meth:`Copier.release`."""
        del self._events[ticket]

    def after_compute(self) -> None:
        """As :meth:`Copier.after_compute`."""
        event = torch.cuda.Event()
        event.record(self._compute_stream())
        for stream in self._lanes.values():
            stream.wait_event(event)

    def close(self) -> None:
        """Waits for all copies and unlocks the arena. Safe to repeat."""
        for stream in self._lanes.values():
            stream.synchronize()
        self._events.clear()
        self._locked.close()
