"""The torch-free C++ core (``csrc/c_api.h``) through ctypes.

Raises :class:`NativeError` with the core's message where a function reports failure.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path

ABI_VERSION = 4
"""``VMO_ABI_VERSION``: the interface of the core that this module declares."""

_REMEDY = "run `pip install -e .` (or `make setup`)"


NO_EXPERT = -1
"""``VMO_NO_EXPERT``: the id of a token that is padding, which needs nothing and counts nowhere."""


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


class Counters(ctypes.Structure):
    """``vmo_counters``: totals since a planner was made."""

    _fields_ = (
        ("hits", c_int64),
        ("misses", c_int64),
        ("bypasses", c_int64),
        ("evictions", c_int64),
        ("prefetch_issued", c_int64),
        ("prefetch_useful", c_int64),
        ("prefetch_late", c_int64),
        ("prefetch_wasted", c_int64),
        ("calls", c_int64),
    )


class PlannerView(ctypes.Structure):
    """``vmo_planner_view``: where a planner keeps what it shows."""

    _fields_ = (
        ("scores", c_void_p),
        ("page_table", c_void_p),
        ("last_use", c_void_p),
        ("counters", POINTER(Counters)),
        ("num_resident", POINTER(c_int32)),
        ("experts", c_void_p),
        ("slots", c_void_p),
        ("miss_experts", c_void_p),
        ("miss_slots", c_void_p),
        ("miss_kinds", c_void_p),
    )


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


class ReservedSlot(ctypes.Structure):
    """``vmo_reserved_slot``: an expert to be read ahead, and the slot reserved for it."""

    _fields_ = (("layer", c_int32), ("expert", c_int32), ("slot", c_int32))


class LayerCall(ctypes.Structure):
    """``vmo_layer_call``: one layer call from the routing on."""

    _fields_ = (
        ("ids", c_void_p),
        ("slots", c_void_p),
        ("weights", c_void_p),
        ("observer", c_void_p),
        ("lookahead", c_void_p),
        ("hidden", c_void_p),
        ("reads", c_void_p),
        ("num_tokens", c_int64),
        ("num_padded_tokens", c_int64),
        ("hidden_stride", c_int64),
        ("layer", c_int32),
        ("id_bytes", c_int32),
        ("top_k", c_int32),
        ("flags", c_uint32),
        ("hidden_type", c_int32),
        ("max_reads", c_int32),
        ("threshold", c_float),
        ("value", c_float),
    )


class LayerOutcome(ctypes.Structure):
    """``vmo_layer_outcome``: what one layer call came to.

    Distinct experts needed; how many of them were resident and how many were not; how many
    others are to be read ahead; nanoseconds of observing and looking ahead.
    """

    _fields_ = (
        ("num_experts", c_int32),
        ("num_hits", c_int32),
        ("num_misses", c_int32),
        ("num_reads", c_int32),
        ("policy_ns", c_int64),
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
        ("num_tokens", c_int32),
        ("top_k", c_int32),
        ("num_running", c_int32),
        ("use", c_float),
    )


_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "vmo_abi_version": (c_int32, []),
    "vmo_last_error": (c_char_p, []),
    "vmo_planner_create": (c_void_p, [c_int32] * 7 + [POINTER(PlannerView)]),
    "vmo_planner_destroy": (None, [c_void_p]),
    "vmo_planner_finish": (c_int32, [c_void_p]),
    "vmo_planner_complete": (c_int32, [c_void_p, c_int32, c_int32]),
    "vmo_planner_prefetch": (c_int32, [c_void_p, c_int32, c_int32, c_float]),
    "vmo_planner_cancel_prefetch": (c_int32, [c_void_p, c_int32]),
    "vmo_planner_is_resident": (c_int32, [c_void_p, c_int32, c_int32]),
    "vmo_expert_histogram": (
        c_int32,
        [c_void_p, c_int64, c_int32, c_int32, c_void_p, c_int32, c_void_p],
    ),
    "vmo_serve_layer": (c_int32, [c_void_p, POINTER(LayerCall), POINTER(LayerOutcome)]),
    "vmo_lookahead_create": (
        c_void_p,
        [c_int32] * 7 + [c_float, c_void_p, c_int32, c_void_p, c_void_p, c_void_p, c_void_p],
    ),
    "vmo_lookahead_destroy": (None, [c_void_p]),
    "vmo_lookahead_begin_step": (c_int32, [c_void_p, c_int64]),
    "vmo_lookahead_observe": (c_int32, [c_void_p, c_int32, c_void_p]),
    "vmo_lookahead_foresee": (c_int32, [c_void_p, c_void_p, POINTER(LayerCall)]),
    "vmo_follow_values": (c_int32, [POINTER(ValueStep)]),
    "vmo_follow": (None, [c_void_p, c_void_p, c_void_p, c_float, c_float, c_int64]),
    "vmo_reader_open": (
        c_void_p,
        [POINTER(c_char_p), c_int32, c_int32, c_int32, c_void_p, c_int32],
    ),
    "vmo_reader_close": (None, [c_void_p]),
    "vmo_reader_num_ended": (c_void_p, [c_void_p]),
    "vmo_reader_file_bytes": (c_int64, [c_void_p]),
    "vmo_reader_submit": (c_int32, [c_void_p, POINTER(Read), c_int32]),
    "vmo_reader_promote": (c_int32, [c_void_p, c_int64]),
    "vmo_reader_drop": (c_int32, [c_void_p, c_int64]),
    "vmo_reader_wait": (c_int32, [c_void_p, POINTER(Completion), c_int32, c_int32, c_int32]),
}


def _library_path() -> Path:
    """Where the core lies: beside this file, or at ``$VMO_CORE_LIBRARY``.

    The variable is for tests of another build, such as one under AddressSanitizer.
    """
    override = os.environ.get("VMO_CORE_LIBRARY")
    if override:
        return Path(override)
    path = Path(__file__).with_name("_core.so")
    if not path.exists():
        raise ImportError(
            f"the C++ core of vllm-moe-offload is not built: no {path.name} in {path.parent}; "
            f"{_REMEDY}"
        )
    return path


def load_core(path: Path) -> ctypes.CDLL:
    """The core at ``path``, its functions declared.

    Raises:
        ImportError: it has another interface than this module declares; names both and the
            remedy.
    """
    library = ctypes.CDLL(str(path))
    # One from before there was a number does not tell it.
    version = library.vmo_abi_version() if hasattr(library, "vmo_abi_version") else 0
    if version != ABI_VERSION:
        raise ImportError(
            f"the C++ core {path} has interface {version}, this code needs {ABI_VERSION}; build "
            f"it again: {_REMEDY}"
        )
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library


core = load_core(_library_path())


def last_error() -> NativeError:
    """The error that the core reported last in this thread."""
    return NativeError(core.vmo_last_error().decode())


def check(result: int) -> int:
    """``result``, or :class:`NativeError` if it is negative."""
    if result < 0:
        raise last_error()
    return result
