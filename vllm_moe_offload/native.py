"""The torch-free C++ core (``csrc/c_api.h``) through ctypes.

Raises :class:`NativeError` with the core's message where a function reports failure.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path


class NativeError(RuntimeError):
    """A failure reported by the C++ core."""


SCORES_STAY, GAIN_BY_VOTES, GAIN_BY_USES = 0, 1, 2
"""``Observer.follows``."""


class Extent(ctypes.Structure):
    """``vmo_extent``."""

    _fields_ = (("destination", c_void_p), ("length", c_uint64))


class Read(ctypes.Structure):
    """``vmo_read``."""

    _fields_ = (
        ("offset", c_uint64),
        ("extents", POINTER(Extent)),
        ("num_extents", c_int32),
        ("priority", c_int32),
        ("tag", c_int64),
    )


class Completion(ctypes.Structure):
    """``vmo_completion``."""

    _fields_ = (("tag", c_int64), ("error", c_int32), ("padding", c_int32), ("bytes", c_uint64))


class Observer(ctypes.Structure):
    """``vmo_observer``: where a policy keeps what a step routed to, and what scores gain by it."""

    _fields_ = (
        ("ids", c_void_p),
        ("votes", c_void_p),
        ("scores", c_void_p),
        ("fade", c_void_p),
        ("gains", c_void_p),
        ("decay", c_float),
        ("ids_per_layer", c_int32),
        ("follows", c_int32),
        ("layers_seen", c_int32),
    )


class ValueStep(ctypes.Structure):
    """``vmo_value_step``: routing of consecutive layers, and the forecasts that follow it."""

    _fields_ = (
        ("values", c_void_p),
        ("weights", c_void_p),
        ("states", c_void_p),
        ("ids", c_void_p),
        ("owners", c_void_p),
        ("running", c_void_p),
        ("kept", c_void_p),
        ("scores", c_void_p),
        ("factors", c_void_p),
        ("num_layers", c_int32),
        ("num_experts", c_int32),
        ("first_layer", c_int32),
        ("end_layer", c_int32),
        ("num_rows", c_int32),
        ("top_k", c_int32),
        ("num_running", c_int32),
        ("use", c_float),
    )


_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "vmo_last_error": (c_char_p, []),
    "vmo_planner_create": (c_void_p, [c_int32] * 7),
    "vmo_planner_destroy": (None, [c_void_p]),
    "vmo_planner_plan": (
        c_int32,
        [c_void_p, c_int32, c_void_p, c_int64, c_int32, c_uint32, c_void_p],
    ),
    "vmo_planner_finish": (c_int32, [c_void_p]),
    "vmo_planner_drive": (
        c_int32,
        [c_void_p, c_int32, c_int32, c_void_p, c_int64, c_void_p, c_float],
    ),
    "vmo_planner_complete": (c_int32, [c_void_p, c_int32, c_int32]),
    "vmo_planner_prefetch": (c_int32, [c_void_p, c_int32, c_int32, c_float]),
    "vmo_planner_cancel_prefetch": (c_int32, [c_void_p, c_int32]),
    "vmo_planner_remap": (
        c_int32,
        [c_void_p, c_int32, c_void_p, c_int64, c_int64, c_int32, c_void_p],
    ),
    "vmo_planner_plan_array": (c_void_p, [c_void_p, c_int32]),
    "vmo_planner_scores": (c_void_p, [c_void_p]),
    "vmo_planner_page_table": (c_void_p, [c_void_p]),
    "vmo_planner_last_use": (c_void_p, [c_void_p]),
    "vmo_planner_counters": (c_void_p, [c_void_p]),
    "vmo_planner_num_resident": (c_int32, [c_void_p]),
    "vmo_planner_is_resident": (c_int32, [c_void_p, c_int32, c_int32]),
    "vmo_expert_histogram": (
        c_int32,
        [c_void_p, c_int64, c_int32, c_int32, c_void_p, c_int32, POINTER(c_float)],
    ),
    "vmo_lookahead_create": (
        c_void_p,
        [c_int32] * 6 + [c_float, c_void_p, c_int32, c_void_p, c_void_p, c_void_p, c_void_p],
    ),
    "vmo_lookahead_destroy": (None, [c_void_p]),
    "vmo_lookahead_begin_step": (c_int32, [c_void_p, c_int64]),
    "vmo_lookahead_observe": (c_int32, [c_void_p, c_int32, c_void_p]),
    "vmo_lookahead_foresee": (
        c_int32,
        [
            c_void_p,
            c_void_p,
            c_int32,
            c_void_p,
            c_int32,
            c_int64,
            c_float,
            c_float,
            c_int32,
            c_void_p,
        ],
    ),
    "vmo_follow_values": (c_int32, [POINTER(ValueStep)]),
    "vmo_follow": (None, [c_void_p, c_void_p, c_void_p, c_float, c_float, c_int64]),
    "vmo_reader_open": (c_void_p, [c_char_p, c_int32, c_int32, c_void_p, c_int32]),
    "vmo_reader_close": (None, [c_void_p]),
    "vmo_reader_num_ended": (c_void_p, [c_void_p]),
    "vmo_reader_file_bytes": (c_int64, [c_void_p]),
    "vmo_reader_submit": (c_int32, [c_void_p, POINTER(Read), c_int32]),
    "vmo_reader_promote": (c_int32, [c_void_p, c_int64]),
    "vmo_reader_cancel": (c_int32, [c_void_p, c_int64]),
    "vmo_reader_abort": (c_int32, [c_void_p, c_int64]),
    "vmo_reader_wait": (c_int32, [c_void_p, POINTER(Completion), c_int32, c_int32, c_int32]),
}


def _library_path() -> Path:
    """Where the core lies: beside this file, or at ``$VMO_CORE_LIBRARY``.

    The variable is for tests of another build, such as one under AddressSanitizer.
    """
    override = os.environ.get("VMO_CORE_LIBRARY")
    if override:
        return Path(override)
    here = Path(__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        path = here / f"_core{suffix}"
        if path.exists():
            return path
    raise ImportError(
        f"the C++ core of vllm-moe-offload is not built: no _core{EXTENSION_SUFFIXES[0]} in "
        f"{here}; run `pip install --no-build-isolation -e .` (or `make setup`)"
    )


def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_library_path()))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library


core = _load()


def last_error() -> NativeError:
    """The error that the core reported last in this thread."""
    return NativeError(core.vmo_last_error().decode())


def check(result: int) -> int:
    """``result``, or :class:`NativeError` if it is negative."""
    if result < 0:
        raise last_error()
    return result
