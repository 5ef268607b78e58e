"""The tiers of a CUDA device: file, page-locked host memory, slot pool on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vllm_moe_offload.pool import SlotPool
from vllm_moe_offload.store import ExpertStore
from vllm_moe_offload.transfer.device import DeviceTransfer
from vllm_moe_offload.transfer.engine import DEFAULT_THREADS


def cuda_transfer(
    store: ExpertStore,
    pool: SlotPool,
    *,
    host_rows: int,
    compute_stream: Callable[[], int],
    num_threads: int = DEFAULT_THREADS,
    cpus: Sequence[int] = (),
    direct: bool = True,
    verify: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> DeviceTransfer:
    """Fills the host tier from the store and connects it to the pool.

    Args:
        store: what to serve.
        pool: ``SlotPool(store.layout, num_rows, device=torch.device("cuda", index))``.
        host_rows: experts in host memory, 2 at least; more than the store has are all of them.
        compute_stream: handle of the stream on which kernels that read the pool are launched
            now, ``lambda: torch.cuda.current_stream().cuda_stream``.
        num_threads, cpus, direct, verify: as :class:`TransferEngine`.
        progress: called with the number of experts read into host memory and their total.

    Raises:
        ImportError: ``_cuda.so`` is not built; names the remedy.
        CudaError: the device or the driver refuses; names call, code and message.
        MemoryError: the system refuses the host memory.
        TransferError: an expert cannot be read.
    """
    raise NotImplementedError
