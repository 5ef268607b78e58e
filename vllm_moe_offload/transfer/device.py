"""DeviceTransfer: from the file over host memory into the rows of a pool on a device."""

from __future__ import annotations

from vllm_moe_offload.transfer.copier import Copier
from vllm_moe_offload.transfer.host_tier import HostTier

MOST_QUEUED_PREFETCHES = 2
"""Prefetches that the device has to copy at a time: one that runs and one behind it. Copy
engines work in order, so a demand waits for what is queued, and no stream priority helps."""


class DeviceTransfer:
    """Brings experts into device rows; a :class:`~vllm_moe_offload.transfer.base.Transfer`."""

    def __init__(
        self,
        host: HostTier,
        copier: Copier,
        *,
        max_queued_prefetches: int = MOST_QUEUED_PREFETCHES,
    ) -> None:
        """Takes over ``host`` and ``copier``: :meth:`close` closes both.

        Serving builds all three with :func:`vllm_moe_offload.transfer.cuda.cuda_transfer`.

        Args:
            host: the tier that copies come from.
            copier: moves bytes from ``host.arena`` into the pool's rows.
            max_queued_prefetches: as :data:`MOST_QUEUED_PREFETCHES`.
        """
        raise NotImplementedError
