"""Host memory that a CUDA device copies from, page-locked where it lies."""

from __future__ import annotations

import platform
import resource
import weakref

import torch

from vllm_moe_offload.transfer.record_reader import Bytes

_GIB = 1 << 30
_PORTABLE, _MAPPED = 1, 2
"""``cudaHostRegisterPortable`` and ``cudaHostRegisterMapped``."""


class PageLockError(MemoryError):
    """Host memory cannot be page-locked; the message names size, reason and remedy."""


class PageLocked:
    """An arena whose pages stay where they are, and have addresses on the device.

    torch finds such memory pinned, whoever allocated it.

    Attributes:
        arena: as given; kept alive.
    """

    def __init__(self, arena: Bytes) -> None:
        """Page-locks all of the arena, in one range that a kernel can read from end to end.

        Args:
            arena: uint8, contiguous and page aligned. Its pages should be there already: the
                driver brings in those that are missing with one thread.

        Raises:
            PageLockError: the driver refuses.
        """
        self.arena = arena
        address = arena.ctypes.data
        code = torch.cuda.cudart().cudaHostRegister(address, arena.nbytes, _PORTABLE | _MAPPED)
        if int(code):
            raise PageLockError(
                f"cannot page-lock {arena.nbytes / _GIB:.2f} GiB of host memory for experts: "
                f"cudaHostRegister: {_words(code)}; {_remedy()}"
            )
        # Memory must not be freed while it is locked: hence the argument.
        self._finalizer = weakref.finalize(self, _unlock, address, arena)
        self._finalizer.atexit = False  # the driver may be gone by then

    def close(self) -> None:
        """Unlocks the arena. Nothing may be copied from it any more. Safe to repeat.

        Raises:
            RuntimeError: the driver refuses; names the reason.
        """
        self._finalizer()


def _unlock(address: int, kept_alive: Bytes) -> None:
    del kept_alive
    code = torch.cuda.cudart().cudaHostUnregister(address)
    if int(code):
        raise RuntimeError(f"cudaHostUnregister: {_words(code)}")


def _words(code: int) -> str:
    """The driver's, and its number of the error."""
    return f"{torch.cuda.cudart().cudaGetErrorString(code)} ({int(code)})"


def _remedy() -> str:
    if "microsoft" in platform.release().lower():
        return (
            "WSL2 limits page-locked memory: lower host_gb; vLLM itself pins memory there only "
            "with VLLM_WSL2_ENABLE_PIN_MEMORY=1"
        )
    return (
        f"lower host_gb, or raise ulimit -l (now {_memlock_limit()}) or the memory limit of "
        "the process's cgroup"
    )


def _memlock_limit() -> str:
    limit_bytes, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit_bytes == resource.RLIM_INFINITY:
        return "unlimited"
    return f"{limit_bytes // 1024} KiB"  # as the shell says it
