"""The tiers of a CUDA device: file, page-locked host memory, slot pool on the device."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence

from vllm_moe_offload.cache.pool import SlotPool
from vllm_moe_offload.store import ExpertStore
from vllm_moe_offload.transfer.copier import DEMAND_LANE, Copier
from vllm_moe_offload.transfer.device import DeviceTransfer
from vllm_moe_offload.transfer.engine import DEFAULT_THREADS
from vllm_moe_offload.transfer.host_tier import HostTier
from vllm_moe_offload.transfer.page_lock import PageLocked
from vllm_moe_offload.transfer.torch_copier import TorchCopier

_MEASURED_COPIES = 5


def filled_host_tier(
    store: ExpertStore,
    host_slots: int,
    *,
    num_threads: int = DEFAULT_THREADS,
    cpus: Sequence[int] = (),
    direct: bool = True,
    verify: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[HostTier, PageLocked]:
    """A host tier with experts in all slots, and its arena page-locked.

    Args:
        store: what to serve.
        host_slots: experts in host memory, 2 at least; more than the store has are all of them.
        num_threads, cpus, direct, verify: as :class:`TransferEngine`.
        progress: called with the number of experts read into host memory and their total.

    Raises:
        MemoryError: the system refuses the host memory.
        PageLockError: the driver refuses to lock it.
        TransferError: an expert cannot be read.
    """
    host = HostTier(
        store, host_slots, num_threads=num_threads, cpus=cpus, direct=direct, verify=verify
    )
    with contextlib.ExitStack() as on_error:
        on_error.callback(host.close)
        host.fill(progress)
        locked = PageLocked(host.arena)
        on_error.pop_all()
    return host, locked


def cuda_transfer(
    store: ExpertStore,
    pool: SlotPool,
    *,
    host_slots: int,
    num_threads: int = DEFAULT_THREADS,
    cpus: Sequence[int] = (),
    direct: bool = True,
    verify: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> DeviceTransfer:
    """Fills the host tier from the store and connects it to the pool.

    Leaves an expert in slot 0 of the pool: the copy whose time is taken.

    Args:
        store: what to serve.
        pool: ``SlotPool(store.layout, num_slots, device=torch.device("cuda", index))``.
        host_slots, num_threads, cpus, direct, verify, progress: as :func:`filled_host_tier`.

    Raises:
        CopyError: the device or the driver refuses; names call and reason.
        MemoryError, PageLockError, TransferError: as :func:`filled_host_tier`.
    """
    host, locked = filled_host_tier(
        store,
        host_slots,
        num_threads=num_threads,
        cpus=cpus,
        direct=direct,
        verify=verify,
        progress=progress,
    )
    with contextlib.ExitStack() as on_error:
        on_error.callback(locked.close)
        on_error.callback(host.close)
        copier = TorchCopier(pool, locked)
        on_error.callback(copier.close)
        transfer = DeviceTransfer(host, copier, expert_ns=_measure_copy_ns(copier))
        on_error.pop_all()
    return transfer


def _measure_copy_ns(copier: Copier) -> float:
    """The shortest of a few copies of one expert into slot 0."""
    copier.after_compute()
    times = []
    for _ in range(_MEASURED_COPIES):
        began = time.perf_counter_ns()
        ticket = copier.copy(DEMAND_LANE, [(0, 0)])
        copier.wait_on_host(ticket)
        times.append(time.perf_counter_ns() - began)
        copier.release(ticket)
    return float(min(times))
