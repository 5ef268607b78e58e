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
    """What one row of the pool holds."""

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
    rows: list[int]
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

    def row_of(self, key: tuple[int, int]) -> int:
        for row, slot in enumerate(self.slots):
            if slot.key == key:
                return row
        return -1

    def value(self, key: tuple[int, int]) -> float:
        return self.last_use.get(key, 0) if self.recency else self.scores.get(key, 0.0)

    def victims(self, layer: int) -> list[int]:
        """Rows that may be evicted for ``layer``, best victim first."""
        rows = [
            row
            for row, slot in enumerate(self.slots)
            if slot.state == RESIDENT
            and not slot.pinned
            and not slot.fresh
            and not slot.expected
            and (not self.per_layer or slot.key[0] == layer)
        ]
        return sorted(
            rows, key=lambda row: (self.value(self.slots[row].key), self.slots[row].key)
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

    def release(self, row: int) -> None:
        self.slots[row] = Slot()
        if not self.fixed:
            self.free.append(row)

    def evict(self, row: int) -> None:
        self.counters["evictions"] += 1
        if self.slots[row].prefetched:
            self.counters["prefetch_wasted"] += 1
        self.release(row)

    def plan(
        self, layer: int, ids: list[int], *, transient: bool = False, instant: bool = False
    ) -> Plan | None:
        needed = sorted(set(ids) - {NO_EXPERT})
        rows = [self.row_of((layer, expert)) for expert in needed]
        missing = [i for i, row in enumerate(rows) if row < 0]
        awaited = [i for i, row in enumerate(rows) if row >= 0 and self.is_loading(row)]
        for row in rows:
            if row >= 0:
                self.slots[row].pinned = True
        wanting = 0 if self.fixed else max(len(missing) - len(self.free), 0)
        victims = self.victims(layer)
        if len(victims) < wanting:
            self.forget_expected(None)
            victims = self.victims(layer)
        if len(victims) < wanting:
            for row in rows:
                if row >= 0:
                    self.slots[row].pinned = False
            return None
        plan = Plan(needed, rows, hits=len(needed) - len(missing) - len(awaited))
        if not transient:
            self.count(layer, plan, len(missing), awaited)
        plan.misses = [(needed[i], rows[i], AWAIT) for i in awaited]
        for victim in victims[:wanting]:
            self.evict(victim)
        for i in missing:
            row = layer * self.experts + needed[i] if self.fixed else self.free.pop()
            self.slots[row] = Slot(
                (layer, needed[i]),
                RESIDENT if instant else LOADING,
                pinned=True,
                transient=transient and not self.fixed,
                fresh=not transient,
            )
            rows[i] = row
            plan.misses.append((needed[i], row, READ))
        self.open = (layer, plan)
        return plan

    def count(self, layer: int, plan: Plan, missing: int, awaited: list[int]) -> None:
        self.clock += 1
        self.counters["calls"] += 1
        self.counters["hits"] += plan.hits
        self.counters["misses"] += missing + len(awaited)
        self.counters["prefetch_late"] += len(awaited)
        for expert, row in zip(plan.experts, plan.rows, strict=True):
            self.last_use[layer, expert] = self.clock
            if row >= 0:
                slot = self.slots[row]
                if slot.prefetched and slot.state == RESIDENT:
                    self.counters["prefetch_useful"] += 1
                slot.prefetched = False

    def is_loading(self, row: int) -> bool:
        return self.slots[row].state == LOADING

    def forget_expected(self, layer: int | None) -> None:
        for slot in self.slots:
            if slot.key is not None and layer in (None, slot.key[0]):
                slot.expected = False

    def finish(self) -> None:
        layer, plan = self.open
        self.forget_expected(layer)
        rows = [row for row in plan.rows if row >= 0]
        for row in rows:
            if self.slots[row].state == LOADING or self.slots[row].transient:
                self.release(row)
        if not self.fixed:
            self.trim(layer, [row for row in rows if self.slots[row].fresh])
        for row in rows:
            self.slots[row].pinned = self.slots[row].fresh = False
        self.open = None

    def trim(self, layer: int, fresh: list[int]) -> None:
        """Until the pool fits its slots, the least valuable go."""
        if self.admission:
            fresh.sort(key=lambda row: -self.scores.get(self.slots[row].key, 0.0))
        for row in fresh[max(len(fresh) - max(self.occupied(layer) - self.share, 0), 0) :]:
            victims = self.victims(layer)
            if victims and (
                not self.admission
                or self.value(self.slots[row].key) > self.value(self.slots[victims[0]].key)
            ):
                self.evict(victims[0])
            else:
                self.counters["bypasses"] += 1
                self.release(row)

    def complete(self, row: int, ok: bool) -> None:
        slot = self.slots[row]
        assert slot.state == LOADING
        if ok:
            slot.state = RESIDENT
            return
        if slot.prefetched:
            self.counters["prefetch_wasted"] += 1
        self.release(row)
        if self.open is not None:
            rows = self.open[1].rows
            rows[:] = [-1 if planned == row else planned for planned in rows]

    def prefetch(self, layer: int, expert: int, value: float) -> int:
        key = (layer, expert)
        present = self.row_of(key)
        if present >= 0:
            self.slots[present].expected |= not self.slots[present].transient
            return -1
        if self.fixed:
            row = layer * self.experts + expert
        elif self.free and self.occupied(layer) < self.share:
            row = self.free.pop()
        else:
            victims = self.victims(layer)
            if not victims:
                return -1
            loser = self.slots[victims[0]].key
            if not value > self.scores.get(loser, 0.0):
                return -1
            self.evict(victims[0])
            row = self.free.pop()
        self.slots[row] = Slot(key, LOADING, prefetched=True, expected=True)
        self.counters["prefetch_issued"] += 1
        return row

    def cancel_prefetch(self, row: int) -> None:
        self.counters["prefetch_issued"] -= 1
        self.release(row)
