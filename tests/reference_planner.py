"""The planner once more, in plain Python: slow, and meant to be obviously right.

Shares no code with ``csrc/planner.cpp``; ``tests/test_cache.py`` drives both with the same
random commands. Slots are dictionary entries, every choice is a ``min`` over a list.
"""

from __future__ import annotations

from dataclasses import dataclass, field

FREE, LOADING, RESIDENT = "free", "loading", "resident"
READ, AWAIT, NO_SLOT = 0, 1, 2

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
        unbounded_staging: bool = False,
    ) -> None:
        self.layers, self.experts = layers, experts
        self.num_slots = slots
        self.recency, self.per_layer = recency, per_layer
        self.admission, self.unbounded = admission, unbounded_staging
        self.fixed = slots >= layers * experts
        self.slots = [Slot() for _ in range(slots + staging)]
        pools = layers if per_layer else 1
        share = slots // pools
        # Stacks: the last entry is taken first.
        self.free = [
            list(range(p * share + share - 1, p * share - 1, -1)) for p in range(pools)
        ]
        self.free_staging = list(range(slots + staging - 1, slots - 1, -1))
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
            for row, slot in enumerate(self.slots[: self.num_slots])
            if slot.state == RESIDENT
            and not slot.pinned
            and not slot.expected
            and (not self.per_layer or slot.key[0] == layer)
        ]
        return sorted(
            rows, key=lambda row: (self.value(self.slots[row].key), self.slots[row].key)
        )

    def pool(self, layer: int) -> list[int]:
        return self.free[layer if self.per_layer else 0]

    # ---- commands --------------------------------------------------------------------

    def release(self, row: int) -> None:
        slot = self.slots[row]
        layer = slot.key[0]
        self.slots[row] = Slot()
        if row >= self.num_slots:
            self.free_staging.append(row)
        elif not self.fixed:
            self.pool(layer).append(row)

    def evict(self, row: int) -> None:
        self.counters["evictions"] += 1
        if self.slots[row].prefetched:
            self.counters["prefetch_wasted"] += 1
        self.release(row)

    def plan(
        self, layer: int, ids: list[int], *, transient: bool = False, instant: bool = False
    ) -> Plan | None:
        needed = sorted(set(ids))
        rows = [self.row_of((layer, expert)) for expert in needed]
        missing = [i for i, row in enumerate(rows) if row < 0]
        awaited = [i for i, row in enumerate(rows) if row >= 0 and self.is_loading(row)]
        for row in rows:
            if row >= 0:
                self.slots[row].pinned = True
        free = len(missing) if self.fixed else len(self.pool(layer))
        victims = self.victims(layer) if len(missing) > free else []
        if not self.unbounded and len(missing) > free + len(self.free_staging) + len(victims):
            self.forget_expected(None)
            victims = self.victims(layer)
        room = free + len(self.free_staging) + len(victims)
        if not self.unbounded and len(missing) > room:
            for row in rows:
                if row >= 0:
                    self.slots[row].pinned = False
            return None
        plan = Plan(needed, rows, hits=len(needed) - len(missing) - len(awaited))
        if not transient:
            self.count(layer, plan, len(missing), awaited)
        plan.misses = [(needed[i], rows[i], AWAIT) for i in awaited]
        if self.admission and not transient:
            missing.sort(key=lambda i: -self.scores.get((layer, needed[i]), 0.0))
        for i in missing:
            key = (layer, needed[i])
            row, kept = self.place(key, victims, transient)
            if row is None:
                plan.misses.append((needed[i], -1, NO_SLOT))
                continue
            self.slots[row] = Slot(
                key,
                RESIDENT if instant else LOADING,
                pinned=True,
                transient=not kept or row >= self.num_slots,
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

    def place(
        self, key: tuple[int, int], victims: list[int], transient: bool
    ) -> tuple[int | None, bool]:
        """Row for a missing expert and whether it stays there; takes from ``victims``."""
        layer = key[0]
        if transient:
            if self.free_staging:
                return self.free_staging.pop(), False
            if self.fixed:
                return key[0] * self.experts + key[1], True
            if self.pool(layer):
                return self.pool(layer).pop(), False
            return (self.replace(layer, victims), False) if victims else (None, False)
        if self.fixed:
            return key[0] * self.experts + key[1], True
        if self.pool(layer):
            return self.pool(layer).pop(), True
        if victims:
            loser = self.slots[victims[0]].key
            if not self.admission or self.scores.get(key, 0.0) > self.scores.get(loser, 0.0):
                return self.replace(layer, victims), True
        if self.free_staging:
            self.counters["bypasses"] += 1
            return self.free_staging.pop(), False
        if self.unbounded:
            self.counters["bypasses"] += 1
            return None, False
        return self.replace(layer, victims), True

    def replace(self, layer: int, victims: list[int]) -> int:
        self.evict(victims.pop(0))
        return self.pool(layer).pop()

    def is_loading(self, row: int) -> bool:
        return self.slots[row].state == LOADING

    def forget_expected(self, layer: int | None) -> None:
        for slot in self.slots:
            if slot.key is not None and layer in (None, slot.key[0]):
                slot.expected = False

    def finish(self) -> None:
        layer, plan = self.open
        self.forget_expected(layer)
        for row in plan.rows:
            if row < 0:
                continue
            slot = self.slots[row]
            slot.pinned = False
            if slot.key is not None and (slot.state == LOADING or slot.transient):
                self.release(row)
        self.open = None

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
            self.slots[present].expected = present < self.num_slots
            return -1
        if self.fixed:
            row = layer * self.experts + expert
        elif self.free[0]:
            row = self.free[0].pop()
        else:
            victims = self.victims(layer)
            if not victims:
                return -1
            loser = self.slots[victims[0]].key
            if not value > self.scores.get(loser, 0.0):
                return -1
            row = self.replace(layer, victims)
        self.slots[row] = Slot(key, LOADING, prefetched=True, expected=True)
        self.counters["prefetch_issued"] += 1
        return row

    def cancel_prefetch(self, row: int) -> None:
        self.counters["prefetch_issued"] -= 1
        self.release(row)
