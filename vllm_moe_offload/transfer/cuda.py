"""The tiers of a CUDA device: file, page-locked host memory, slot pool on the device."""

from __future__ import annotations

import contextlib
import ctypes
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from vllm_moe_offload.cache.pool import SlotPool
from vllm_moe_offload.store import ExpertStore
from vllm_moe_offload.transfer.copier import DEMAND_LANE
from vllm_moe_offload.transfer.cuda_library import (
    TensorSlots,
    check_cuda,
    cuda_library,
    last_cuda_error,
)
from vllm_moe_offload.transfer.device import DeviceTransfer
from vllm_moe_offload.transfer.engine import DEFAULT_THREADS
from vllm_moe_offload.transfer.host_tier import HostTier
from vllm_moe_offload.transfer.record_reader import Bytes

CopyEngine = Literal["memcpy", "gather"]

COPY_ENGINE: CopyEngine = "memcpy"
"""``memcpy``: the device's copy engines, tensor by tensor. ``gather``: a kernel that reads host
memory, one launch for all records of a call. Which is faster where was not measured yet."""

_ENGINES: dict[str, int] = {"memcpy": 0, "gather": 1}
_MEASURED_COPIES = 5


class CudaCopier:
    """A :class:`~vllm_moe_offload.transfer.copier.Copier` on two streams of a CUDA device.

    Attributes:
        num_slots: slots of the pool.
    """

    def __init__(
        self,
        pool: SlotPool,
        arena: Bytes,
        *,
        compute_stream: Callable[[], int],
        engine: CopyEngine = COPY_ENGINE,
    ) -> None:
        """Page-locks the arena. Keeps pool and arena alive.

        Args:
            pool: on a CUDA device; copies go to its slots.
            arena: uint8 ``[slots, record_bytes]``, contiguous; records of ``pool.layout``.
            compute_stream: handle of the stream on which kernels that read the pool are
                launched now.
            engine: what copies.

        Raises:
            ImportError: the library is not built.
            CudaError: the device or the driver refuses.
            ValueError: the pool is not on a CUDA device, the arena holds other records, or
                the engine does not exist.
        """
        layout = pool.layout
        if pool.device.type != "cuda":
            raise ValueError(f"the pool is on {pool.device}, not on a CUDA device")
        if engine not in _ENGINES:
            raise ValueError(f"copy engine {engine!r} is not one of {sorted(_ENGINES)}")
        if (
            arena.ndim != 2
            or arena.shape[1] != layout.record_bytes
            or not arena.flags.c_contiguous
        ):
            raise ValueError(
                f"the arena must be contiguous [slots, {layout.record_bytes}], got {arena.shape}"
            )
        self.num_slots = pool.num_slots
        self._compute_stream = compute_stream
        self._library = cuda_library()
        tensors = tensor_slots(pool)
        self._handle: int | None = self._library.vmo_copier_create(
            pool.device.index or 0,
            arena.ctypes.data,
            layout.record_bytes,
            len(arena),
            pool.num_slots,
            tensors,
            len(tensors),
        )
        if not self._handle:
            raise last_cuda_error()
        # Copies must end before the memory at their ends is freed: hence the arguments.
        self._finalizer = weakref.finalize(self, _destroy, self._handle, pool, arena)
        self._finalizer.atexit = False  # the driver may be gone by then
        self.set_engine(engine)

    def set_engine(self, engine: CopyEngine) -> None:
        """What copies from now on."""
        check_cuda(self._library.vmo_copier_set_engine(self._open_handle(), _ENGINES[engine]))

    def _open_handle(self) -> int:
        if self._handle is None:
            raise ValueError("the copier is closed")
        return self._handle

    def copy(self, lane: int, pairs: Sequence[tuple[int, int]]) -> int:
        """As :meth:`Copier.copy`."""
        slots = np.array(pairs, np.int32)  # [n, 2], as vmo_slot_pair lies in memory
        return check_cuda(
            self._library.vmo_copier_copy(
                self._open_handle(), lane, slots.ctypes.data, len(slots)
            )
        )

    def done(self, ticket: int) -> bool:
        """As :meth:`Copier.done`."""
        return bool(check_cuda(self._library.vmo_copier_done(self._open_handle(), ticket)))

    def wait_on_host(self, ticket: int) -> None:
        """As :meth:`Copier.wait_on_host`."""
        check_cuda(self._library.vmo_copier_wait(self._open_handle(), ticket))

    def join(self, ticket: int) -> None:
        """As :meth:`Copier.join`."""
        check_cuda(
            self._library.vmo_copier_join(self._open_handle(), ticket, self._compute_stream())
        )

    def release(self, ticket: int) -> None:
        """As :meth:`Copier.release`."""
        check_cuda(self._library.vmo_copier_release(self._open_handle(), ticket))

    def after_compute(self) -> None:
        """As :meth:`Copier.after_compute`."""
        check_cuda(
            self._library.vmo_copier_after_compute(self._open_handle(), self._compute_stream())
        )

    def close(self) -> None:
        """Waits for all copies, frees streams and unlocks the arena. Safe to repeat."""
        self._handle = None
        self._finalizer()


def _destroy(handle: int, *kept_alive: object) -> None:
    del kept_alive
    cuda_library().vmo_copier_destroy(handle)


def tensor_slots(pool: SlotPool) -> ctypes.Array[TensorSlots]:
    """Where each tensor of a record lies, and where its slots on the device begin."""
    layout, addresses = pool.layout, pool.addresses()
    specs = [spec for spec in (*layout.direct, *layout.tail) if spec.nbytes]
    array = (TensorSlots * len(specs))()
    offset = 0
    for slots, spec in zip(array, specs, strict=True):
        slots.record_offset = offset
        slots.slot_bytes = spec.nbytes
        slots.slots = addresses[spec.name]
        offset += spec.nbytes
    return array


def cuda_transfer(
    store: ExpertStore,
    pool: SlotPool,
    *,
    host_slots: int,
    compute_stream: Callable[[], int],
    num_threads: int = DEFAULT_THREADS,
    cpus: Sequence[int] = (),
    direct: bool = True,
    verify: bool = False,
    engine: CopyEngine = COPY_ENGINE,
    progress: Callable[[int, int], None] | None = None,
) -> DeviceTransfer:
    """Fills the host tier from the store and connects it to the pool.

    Leaves expert 0 of layer 0 in slot 0 of the pool: the copy whose time is taken.

    Args:
        store: what to serve.
        pool: ``SlotPool(store.layout, num_slots, device=torch.device("cuda", index))``.
        host_slots: experts in host memory, 2 at least; more than the store has are all of them.
        compute_stream: handle of the stream on which kernels that read the pool are launched
            now, ``lambda: torch.cuda.current_stream().cuda_stream``.
        num_threads, cpus, direct, verify: as :class:`TransferEngine`.
        engine: what copies.
        progress: called with the number of experts read into host memory and their total.

    Raises:
        ImportError: ``_cuda.so`` is not built; names the remedy.
        CudaError: the device or the driver refuses; names call, code and message.
        MemoryError: the system refuses the host memory.
        TransferError: an expert cannot be read.
    """
    cuda_library()  # before minutes of reading
    host = HostTier(
        store, host_slots, num_threads=num_threads, cpus=cpus, direct=direct, verify=verify
    )
    with contextlib.ExitStack() as on_error:
        on_error.callback(host.close)
        host.fill(progress)
        copier = CudaCopier(pool, host.arena, compute_stream=compute_stream, engine=engine)
        on_error.callback(copier.close)
        transfer = DeviceTransfer(host, copier, expert_ns=_measure_copy_ns(copier))
        on_error.pop_all()
    return transfer


def _measure_copy_ns(copier: CudaCopier) -> float:
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
