"""The CUDA library (``csrc/cuda/cuda_api.h``) through ctypes; loaded when it is asked for."""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_char_p, c_int32, c_uint64, c_void_p
from pathlib import Path

from vllm_moe_offload.native import NativeError

_API_VERSION = 1
_PATH = Path(__file__).parent.parent / "_cuda.so"
_REMEDY = (
    "build it: `VMO_CUDA=1 pip install .` in the clone, with nvcc of CUDA 13 on the path, in NVCC, "
    "or of the wheels that vLLM brings; in an editable install `make cuda`"
)


class CudaError(NativeError):
    """A failure that a CUDA call reported; the message names call, code and reason."""


class TensorSlots(ctypes.Structure):
    """``vmo_tensor_slots``."""

    _fields_ = (("record_offset", c_uint64), ("slot_bytes", c_uint64), ("slots", c_void_p))


_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "vmo_cuda_last_error": (c_char_p, []),
    "vmo_copier_create": (
        c_void_p,
        [c_int32, c_void_p, c_uint64, c_int32, c_int32, POINTER(TensorSlots), c_int32],
    ),
    "vmo_copier_destroy": (None, [c_void_p]),
    "vmo_copier_set_engine": (c_int32, [c_void_p, c_int32]),
    "vmo_copier_copy": (c_int32, [c_void_p, c_int32, c_void_p, c_int32]),
    "vmo_copier_done": (c_int32, [c_void_p, c_int32]),
    "vmo_copier_wait": (c_int32, [c_void_p, c_int32]),
    "vmo_copier_join": (c_int32, [c_void_p, c_int32, c_uint64]),
    "vmo_copier_release": (c_int32, [c_void_p, c_int32]),
    "vmo_copier_after_compute": (c_int32, [c_void_p, c_uint64]),
}


@functools.cache
def cuda_library() -> ctypes.CDLL:
    """The library; the driver is not needed before a copier is made.

    Raises:
        ImportError: it is not built, or of another version; names the remedy.
    """
    if not _PATH.exists():
        raise ImportError(
            f"the CUDA part of vllm-moe-offload is not built: {_PATH} is missing; {_REMEDY}"
        )
    try:
        library = ctypes.CDLL(str(_PATH))
    except OSError as error:
        raise ImportError(f"cannot load {_PATH}: {error}; {_REMEDY}") from error
    version = library.vmo_cuda_api_version()
    if version != _API_VERSION:
        raise ImportError(
            f"{_PATH} has interface {version}, this code needs {_API_VERSION}; {_REMEDY}"
        )
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library


def last_cuda_error() -> CudaError:
    """The error that the library reported last in this thread."""
    return CudaError(cuda_library().vmo_cuda_last_error().decode())


def check_cuda(result: int) -> int:
    """``result``, or :class:`CudaError` if it is negative."""
    if result < 0:
        raise last_cuda_error()
    return result
