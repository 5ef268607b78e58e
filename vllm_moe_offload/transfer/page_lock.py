"""Memory that the system leaves where it is, so that a device reads it by itself."""

from __future__ import annotations

import os
import platform
import resource
import weakref

import torch

from vllm_moe_offload.transfer.record_reader import Bytes

_GIB = 2**30
_PORTABLE_AND_MAPPED = 1 | 2
"""cudaHostRegisterPortable and cudaHostRegisterMapped: for every context, at an address of the
device's."""


class PageLockError(MemoryError):
    """The system or the driver refuses to lock memory; one line with the remedy."""


class PageLocked:
    """An array whose pages stay where they are until :meth:`close`."""

    def __init__(self, array: Bytes) -> None:
        """Locks an array that exists, and keeps it alive.

        Args:
            array: uint8, contiguous, page aligned; its pages are best touched before.

        Raises:
            PageLockError: that is refused.
        """
        address, nbytes = array.ctypes.data, array.nbytes
        error = torch.cuda.cudart().cudaHostRegister(address, nbytes, _PORTABLE_AND_MAPPED)
        if int(error) != 0:
            raise PageLockError(refusal(nbytes, torch.cuda.cudart().cudaGetErrorString(error)))
        self._finalizer = weakref.finalize(self, _unlock, address, array)
        self._finalizer.atexit = False  # the driver may be gone by then

    def close(self) -> None:
        """Unlocks the array, which no device reads any more. Safe to repeat."""
        self._finalizer()


def _unlock(address: int, array: Bytes) -> None:
    del array  # alive until here
    torch.cuda.cudart().cudaHostUnregister(address)


def refusal(nbytes: int, reason: str) -> str:
    """What an error says of memory that cannot be page-locked.

    Args:
        nbytes: to be locked.
        reason: in the driver's words.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    allowed = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit / _GIB:.2f} GiB"
    remedy = f"lower host_gb, or raise `ulimit -l` (now {allowed}) or the cgroup's memory limit"
    if "microsoft" in platform.release().lower():
        remedy = (
            "WSL2 lets little memory be locked: lower host_gb; vLLM itself locks memory there only "
            "with VLLM_WSL2_ENABLE_PIN_MEMORY=1 "
            f"(now {os.environ.get('VLLM_WSL2_ENABLE_PIN_MEMORY', 'not set')})"
        )
    return f"cannot page-lock {nbytes / _GIB:.2f} GiB of host memory: {reason}; {remedy}"
