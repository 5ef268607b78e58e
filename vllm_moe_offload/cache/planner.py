"""ExpertCache: which expert lies in which slot. A thin, numpy-facing view of the C++ planner.

One object per pool. Serving, replay and tests drive the same class, so a replayed trace
counts exactly what a server counted. It never touches the experts' bytes.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.native import (
    NO_EXPERT,
    Counters,
    LayerCall,
    LayerOutcome,
    PlannerView,
    check,
    core,
    last_error,
)

ORDER_SCORE, ORDER_RECENCY = 0, 1
SCOPE_GLOBAL, SCOPE_PER_LAYER = 0, 1


@dataclass(frozen=True, slots=True)
class PlannerRules:
    """How the core chooses victims for a policy.

    Attributes:
        order: :data:`ORDER_SCORE` (least score first) or :data:`ORDER_RECENCY`.
        scope: :data:`SCOPE_GLOBAL`, or :data:`SCOPE_PER_LAYER` (equal share per layer).
        admission: a miss replaces a resident only if its score is higher.
    """

    order: int = ORDER_SCORE
    scope: int = SCOPE_GLOBAL
    admission: bool = True


PLAN_TRANSIENT = 1
"""No request stands behind the call: serve it, count and keep nothing."""
PLAN_UNPINNED = 2
"""Replay of a bound only: the current need may be evicted once it is counted."""
PLAN_INSTANT = 4
"""Replay: reads take no time; misses are resident at once."""

MISS_READ, MISS_AWAIT = 0, 1
"""Kinds of a miss: read it; wait for its prefetch."""

COUNTER_NAMES = tuple(name for name, _ in Counters._fields_)
"""What is counted, in the order of :attr:`ExpertCache.counters`."""


def _view(address: int, shape: tuple[int, ...], ctype: Any) -> npt.NDArray[Any]:
    """Numpy array over memory of the core; valid as long as the planner lives."""
    count = int(np.prod(shape))
    return np.ctypeslib.as_array((ctype * count).from_address(address)).reshape(shape)


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Sizes of one cache: experts in the model and slots in the pool.

    Attributes:
        num_layers: MoE layers that share the pool.
        num_experts: routed experts per layer.
        num_slots: experts that stay between layer calls.
        num_staging_slots: slots beyond that: misses of a layer call are read into free ones, and
            who stays is decided when the call is done.
    """

    num_layers: int
    num_experts: int
    num_slots: int
    num_staging_slots: int = 0

    @property
    def num_pool_slots(self) -> int:
        """Slots of the pool: those, and staging."""
        return self.num_slots + self.num_staging_slots

    @property
    def holds_everything(self) -> bool:
        """Whether every expert has a slot of its own, in logical order."""
        return self.num_slots >= self.num_layers * self.num_experts


class ExpertCache:
    """Page table, slots, plan of one layer call, and counters.

    Attributes:
        scores: float32 ``[num_layers, num_experts]``; written by a policy, read by plan().
        page_table: int32 ``[num_layers, num_experts]``, slot or -1 (read only).
        last_use: uint64 ``[num_layers, num_experts]``, clock of the last counted use.
        counters: int64 ``[9]`` in the order of :data:`COUNTER_NAMES`, updated in place.
        outcome: of the last plan; what serving adds to it is 0 after :meth:`plan`.
    """

    def __init__(
        self, shape: CacheShape, rules: PlannerRules, *, unbounded_staging: bool = False
    ) -> None:
        """``unbounded_staging``: as many staging slots as a layer has experts, so that every
        need fits (replay, where slots hold no bytes).

        Raises NativeError if a size is impossible.
        """
        if unbounded_staging:
            shape = replace(shape, num_staging_slots=shape.num_experts)
        self.shape = shape
        self.rules = rules
        view = PlannerView()
        self.handle: int = core.vmo_planner_create(
            shape.num_layers,
            shape.num_experts,
            shape.num_slots,
            shape.num_staging_slots,
            rules.order,
            rules.scope,
            rules.admission,
            view,
        )
        if not self.handle:
            raise last_error()
        table = (shape.num_layers, shape.num_experts)
        self.scores: npt.NDArray[np.float32] = _view(view.scores, table, ctypes.c_float)
        self.page_table: npt.NDArray[np.int32] = _view(view.page_table, table, ctypes.c_int32)
        self.last_use: npt.NDArray[np.uint64] = _view(view.last_use, table, ctypes.c_uint64)
        self._counters = view.counters.contents
        self.counters: npt.NDArray[np.int64] = _view(
            ctypes.addressof(self._counters), (len(COUNTER_NAMES),), ctypes.c_int64
        )
        self.page_table.flags.writeable = False
        self.last_use.flags.writeable = False
        self.counters.flags.writeable = False
        self._num_resident = view.num_resident.contents
        of_plan = (shape.num_experts,)
        self._experts = _view(view.experts, of_plan, ctypes.c_int32)
        self._slots = _view(view.slots, of_plan, ctypes.c_int32)
        self._miss_experts = _view(view.miss_experts, of_plan, ctypes.c_int32)
        self._miss_slots = _view(view.miss_slots, of_plan, ctypes.c_int32)
        self._miss_kinds = _view(view.miss_kinds, of_plan, ctypes.c_int32)
        self.outcome = LayerOutcome()
        self._call = LayerCall(top_k=1)
        self._plan = self.server_of(self._call)

    def server_of(self, call: LayerCall) -> Callable[[], int]:
        """A function that serves ``call`` as its fields are then (``vmo_serve_layer``).

        Made once for many calls: it writes :attr:`outcome` and returns 1 if the need fits, 0 if
        it does not, -1 on an error. Must not be called once the cache is closed.
        """
        return functools.partial(
            core.vmo_serve_layer,
            ctypes.c_void_p(self.handle),
            ctypes.byref(call),
            ctypes.byref(self.outcome),
        )

    def close(self) -> None:
        """Frees the planner; the tables must not be used afterwards."""
        if self.handle:
            core.vmo_planner_destroy(self.handle)
            self.handle = 0

    def __del__(self) -> None:
        # Tables are views of the planner's memory: whoever keeps one keeps the cache.
        if getattr(self, "handle", 0):
            core.vmo_planner_destroy(self.handle)

    def plan(self, layer: int, ids: npt.NDArray[np.integer[Any]], flags: int = 0) -> bool:
        """Plans one layer call for the experts in ``ids`` (any shape, repeats allowed).

        ``ids`` must be a C-contiguous int32 or int64 array; ``native.NO_EXPERT`` needs nothing.
        Returns False, and changes nothing, if the distinct experts do not fit at once.
        Needed experts stay pinned until :meth:`finish`.

        Raises:
            NativeError: an id or the layer is out of range, or a plan is open.
        """
        call = self._call
        call.ids = ids.ctypes.data
        call.num_tokens = call.num_padded_tokens = ids.size
        call.id_bytes = ids.itemsize
        call.layer = layer
        call.flags = flags
        return bool(check(self._plan()))

    @property
    def experts(self) -> npt.NDArray[np.int32]:
        """Distinct experts of the last plan, ascending (a view)."""
        return self._experts[: self.outcome.num_experts]

    @property
    def slots(self) -> npt.NDArray[np.int32]:
        """Slots of :attr:`experts` (a view)."""
        return self._slots[: self.outcome.num_experts]

    @property
    def misses(
        self,
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Missing experts of the last plan, their slots, and what each needs (views)."""
        count = self.outcome.num_misses
        return self._miss_experts[:count], self._miss_slots[:count], self._miss_kinds[:count]

    def finish(self) -> None:
        """Ends the open plan: decides by the scores of now which of its misses stay."""
        check(core.vmo_planner_finish(self.handle))

    def waves(
        self, layer: int, ids: npt.NDArray[np.integer[Any]], flags: int = 0
    ) -> Iterator[None]:
        """Plans the experts in ``ids``, which do not fit at once, some at a time.

        Each iteration is an open plan, finished when the next is asked for. What is resident
        comes first, so that no wave evicts what a later one would have hit.

        Raises:
            RuntimeError: not even one wave fits.
        """
        needed = np.unique(ids).astype(np.int32)
        needed = needed[needed != NO_EXPERT]
        resident = self.page_table[layer, needed] >= 0
        order = np.concatenate([needed[resident], needed[~resident]])
        size = self.shape.num_slots
        if self.rules.scope == SCOPE_PER_LAYER:
            size //= self.shape.num_layers
        size = max(size + self.shape.num_staging_slots, 1)
        for begin in range(0, order.size, size):
            wave = np.ascontiguousarray(order[begin : begin + size])
            if not self.plan(layer, wave, flags):
                raise RuntimeError(
                    f"{wave.size} experts of layer {layer} do not fit in {self.shape}"
                )
            yield
            self.finish()

    def complete(self, slot: int, ok: bool) -> None:
        """A read into ``slot`` ended; ``ok`` False empties it."""
        check(core.vmo_planner_complete(self.handle, slot, ok))

    def prefetch(self, layer: int, expert: int, value: float) -> int:
        """The expert is expected to be used soon: slot reserved for its prefetch, or -1.

        -1 says that it is resident or in flight already, or that nothing worth less than
        ``value`` (on the scale of :attr:`scores`) may be evicted. Until its layer was served
        an expected expert is evicted only if a plan would not fit otherwise.
        """
        slot = int(core.vmo_planner_prefetch(self.handle, layer, expert, value))
        if slot == -2:
            raise last_error()
        return slot

    def cancel_prefetch(self, slot: int) -> None:
        """Gives back a slot whose prefetch was cancelled before it began."""
        check(core.vmo_planner_cancel_prefetch(self.handle, slot))

    def is_resident(self, layer: int, expert: int) -> bool:
        """Whether the expert's bytes are in its slot (False while in flight)."""
        return bool(core.vmo_planner_is_resident(self.handle, layer, expert))

    @property
    def num_resident(self) -> int:
        """Experts in cache slots whose bytes are there."""
        return int(self._num_resident.value)

    def count(self, name: str) -> int:
        """One counter by its name in :data:`COUNTER_NAMES`."""
        return int(getattr(self._counters, name))
