"""The planner once more, in plain Python: slow, and meant to be obviously right.

Shares no code with ``csrc/planner.cpp``; ``tests/cache/test_planner_reference.py`` drives both
with the same random commands. Slots are dictionary entries, every choice is a ``min`` over a list.
"""

from __future__ import annotations

from dataclasses import dataclass, field

FREE, LOADING, RESIDENT = "free", "loading", "resident"
READ, AWAIT = 0, 1
NO_EXPERT = -1

COUNTERS = (
    "hits",
    "misses",
    "bypasses",
    "evictions",
    "prefetch_issued",
    "prefetch_useful",
    "prefetch_late",
    "prefetch_wasted",
    "calls",
)


@dataclass
class Slot:
    """What one slot of the pool holds."""

    key: tuple[int, int] | None = None
    state: str = FREE
    pinned: bool = False
    transient: bool = False
    fresh: bool = False
    prefetched: bool = False
    expected: bool = False


@dataclass
class Plan:
    """Outcome of one layer call."""

    experts: list[int]
    indices: list[int]
    misses: list[tuple[int, int, int]] = field(default_factory=list)
    hits: int = 0


class ReferencePlanner:
    """See ``csrc/planner.h`` for the contract."""

    def __init__(
        self,
        layers: int,
        experts: int,
        slots: int,
        staging: int,
        *,
        recency: bool = False,
        per_layer: bool = False,
        admission: bool = True,
    ) -> None:
        self.layers, self.experts = layers, experts
        self.recency, self.per_layer = recency, per_layer
        self.admission = admission
        self.fixed = slots >= layers * experts
        self.slots = [Slot() for _ in range(slots + staging)]
        self.share = slots // layers if per_layer else slots
        # A stack: the last entry is taken first.
        self.free = [] if self.fixed else list(range(slots + staging - 1, -1, -1))
        self.scores: dict[tuple[int, int], float] = {}
        self.last_use: dict[tuple[int, int], int] = {}
        self.clock = 0
        self.open: tuple[int, Plan] | None = None
        self.counters = dict.fromkeys(COUNTERS, 0)

    # ---- questions -------------------------------------------------------------------

    def index_of(self, key: tuple[int, int]) -> int:
        for index, slot in enumerate(self.slots):
            if slot.key == key:
                return index
        return -1

    def value(self, key: tuple[int, int]) -> float:
        return self.last_use.get(key, 0) if self.recency else self.scores.get(key, 0.0)

    def victims(self, layer: int) -> list[int]:
        """Rows that may be evicted for ``layer``, best victim first."""
        indices = [
            index
            for index, slot in enumerate(self.slots)
            if slot.state == RESIDENT
            and not slot.pinned
            and not slot.fresh
            and not slot.expected
            and (not self.per_layer or slot.key[0] == layer)
        ]
        return sorted(
            indices,
            key=lambda index: (self.value(self.slots[index].key), self.slots[index].key),
        )

    def occupied(self, layer: int) -> int:
        """Rows that count against the slots of the layer's pool."""
        return sum(
            slot.state != FREE
            and not slot.transient
            and (not self.per_layer or slot.key[0] == layer)
            for slot in self.slots
        )

    # ---- commands --------------------------------------------------------------------

    def release(self, index: int) -> None:
        self.slots[index] = Slot()
        if not self.fixed:
            self.free.append(index)

    def evict(self, index: int) -> None:
        self.counters["evictions"] += 1
        if self.slots[index].prefetched:
            self.counters["prefetch_wasted"] += 1
        self.release(index)

    def plan(
        self, layer: int, ids: list[int], *, transient: bool = False, instant: bool = False
    ) -> Plan | None:
        needed = sorted(set(ids) - {NO_EXPERT})
        indices = [self.index_of((layer, expert)) for expert in needed]
        missing = [i for i, index in enumerate(indices) if index < 0]
        awaited = [
            i for i, index in enumerate(indices) if index >= 0 and self.is_loading(index)
        ]
        for index in indices:
            if index >= 0:
                self.slots[index].pinned = True
        wanting = 0 if self.fixed else max(len(missing) - len(self.free), 0)
        victims = self.victims(layer)
        if len(victims) < wanting:
            self.forget_expected(None)
            victims = self.victims(layer)
        if len(victims) < wanting:
            for index in indices:
                if index >= 0:
                    self.slots[index].pinned = False
            return None
        plan = Plan(needed, indices, hits=len(needed) - len(missing) - len(awaited))
        if not transient:
            self.count(layer, plan, len(missing), awaited)
        plan.misses = [(needed[i], indices[i], AWAIT) for i in awaited]
        for victim in victims[:wanting]:
            self.evict(victim)
        for i in missing:
            index = layer * self.experts + needed[i] if self.fixed else self.free.pop()
            self.slots[index] = Slot(
                (layer, needed[i]),
                RESIDENT if instant else LOADING,
                pinned=True,
                transient=transient and not self.fixed,
                fresh=not transient,
            )
            indices[i] = index
            plan.misses.append((needed[i], index, READ))
        self.open = (layer, plan)
        return plan

    def count(self, layer: int, plan: Plan, missing: int, awaited: list[int]) -> None:
        self.clock += 1
        self.counters["calls"] += 1
        self.counters["hits"] += plan.hits
        self.counters["misses"] += missing + len(awaited)
        self.counters["prefetch_late"] += len(awaited)
        for expert, index in zip(plan.experts, plan.indices, strict=True):
            self.last_use[layer, expert] = self.clock
            if index >= 0:
                slot = self.slots[index]
                if slot.prefetched and slot.state == RESIDENT:
                    self.counters["prefetch_useful"] += 1
                slot.prefetched = False

    def is_loading(self, index: int) -> bool:
        return self.slots[index].state == LOADING

    def forget_expected(self, layer: int | None) -> None:
        for slot in self.slots:
            if slot.key is not None and layer in (None, slot.key[0]):
                slot.expected = False

    def finish(self) -> None:
        layer, plan = self.open
        self.forget_expected(layer)
        indices = [index for index in plan.indices if index >= 0]
        for index in indices:
            if self.slots[index].state == LOADING or self.slots[index].transient:
                self.release(index)
        if not self.fixed:
            self.trim(layer, [index for index in indices if self.slots[index].fresh])
        for index in indices:
            self.slots[index].pinned = self.slots[index].fresh = False
        self.open = None

    def trim(self, layer: int, fresh: list[int]) -> None:
        """Until the pool fits its slots, the least valuable go."""
        if self.admission:
            fresh.sort(key=lambda index: -self.scores.get(self.slots[index].key, 0.0))
        for index in fresh[max(len(fresh) - max(self.occupied(layer) - self.share, 0), 0) :]:
            victims = self.victims(layer)
            if victims and (
                not self.admission
                or self.value(self.slots[index].key) > self.value(self.slots[victims[0]].key)
            ):
                self.evict(victims[0])
            else:
                self.counters["bypasses"] += 1
                self.release(index)

    def complete(self, index: int, ok: bool) -> None:
        slot = self.slots[index]
        assert slot.state == LOADING
        if ok:
            slot.state = RESIDENT
            return
        if slot.prefetched:
            self.counters["prefetch_wasted"] += 1
        self.release(index)
        if self.open is not None:
            indices = self.open[1].indices
            indices[:] = [-1 if planned == index else planned for planned in indices]

    def prefetch(self, layer: int, expert: int, value: float) -> int:
        key = (layer, expert)
        present = self.index_of(key)
        if present >= 0:
            self.slots[present].expected |= not self.slots[present].transient
            return -1
        if self.fixed:
            index = layer * self.experts + expert
        elif self.free and self.occupied(layer) < self.share:
            index = self.free.pop()
        else:
            victims = self.victims(layer)
            if not victims:
                return -1
            loser = self.slots[victims[0]].key
            if not value > self.scores.get(loser, 0.0):
                return -1
            self.evict(victims[0])
            index = self.free.pop()
        self.slots[index] = Slot(key, LOADING, prefetched=True, expected=True)
        self.counters["prefetch_issued"] += 1
        return index

    def cancel_prefetch(self, index: int) -> None:
        self.counters["prefetch_issued"] -= 1
        self.release(index)
