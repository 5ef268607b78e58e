"""A device that is numpy: copies and kernels run later, in any order that streams allow.

More hostile than a real one: copies of one lane may overtake each other, a copy makes a mess of
its slot for as long as it runs, and everything is put off until somebody waits for it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_moe_offload.cache.layout import ExpertLayout


class DeviceError(RuntimeError):
    pass


@dataclass(eq=False)
class Copy:
    source: np.ndarray
    slot: int
    barrier: int  # kernels and joins that must have run
    bytes_when_queued: bytes
    started: bool = False
    done: bool = False


@dataclass
class SimulatedDevice:
    """A Copier, and the compute stream beside it.

    Attributes:
        slots: what the pool holds, by parameter.
        fail: methods that raise DeviceError at their next call.
        most_queued: most copies of a lane that were queued and not done.
    """

    layout: ExpertLayout
    arena: np.ndarray
    num_slots: int
    seed: int = 0
    fail: set[str] = field(default_factory=set)
    closed: bool = False

    def __post_init__(self) -> None:
        self.slots = {
            spec.name: np.full((self.num_slots, spec.nbytes), 0xEE, np.uint8)
            for spec in self.layout.tensors
        }
        self._parts = []
        begin = 0
        for spec in (*self.layout.direct, *self.layout.tail):
            self._parts.append((spec.name, begin, begin + spec.nbytes))
            begin += spec.nbytes
        self._random = random.Random(self.seed)
        self._stream: list[Callable[[], bool]] = []  # each returns whether it could run
        self._executed = 0
        self._barrier = 0
        self._tickets: dict[int, list[Copy]] = {}
        self._lanes: list[list[Copy]] = [[], []]
        self._under_way: list[Copy] = []
        self.copied: list[tuple[int, int]] = []  # lane, slot, in the order of queueing

    # ---- what a copier does --------------------------------------------------------------

    def copy(self, lane: int, pairs: Sequence[tuple[int, int]]) -> int:
        self._maybe_fail("copy")
        assert pairs
        copies = []
        for host_slot, slot in pairs:
            assert 0 <= slot < self.num_slots
            source = self.arena[host_slot]
            copies.append(Copy(source, slot, self._barrier, source.tobytes()))
            self.copied.append((lane, slot))
        ticket = max(self._tickets, default=-1) + 1
        self._tickets[ticket] = copies
        self._lanes[lane] += copies
        self._under_way += copies
        return ticket

    def done(self, ticket: int) -> bool:
        self._maybe_fail("done")
        copies = self._tickets[ticket]
        for _ in range(self._random.randrange(3)):
            self.step()
        return all(copy.done for copy in copies)

    def wait_on_host(self, ticket: int) -> None:
        self._maybe_fail("wait_on_host")
        copies = self._tickets[ticket]
        while not all(copy.done for copy in copies):
            assert self.step(), "the host waits for a copy that can never run"

    def join(self, ticket: int) -> None:
        self._maybe_fail("join")
        copies = self._tickets[ticket]
        self._stream.append(lambda: all(copy.done for copy in copies))

    def release(self, ticket: int) -> None:
        del self._tickets[ticket]

    def after_compute(self) -> None:
        self._maybe_fail("after_compute")
        self._barrier = len(self._stream)

    def close(self) -> None:
        if not self.closed:
            self.synchronize()
        self.closed = True

    # ---- what the rest of the machine does -----------------------------------------------

    def launch(self, kernel: Callable[[], None]) -> None:
        """Puts a kernel on the compute stream."""

        def run() -> bool:
            kernel()
            return True

        self._stream.append(run)

    def num_queued(self, lane: int) -> int:
        """Copies of a lane that are not done."""
        return sum(not copy.done for copy in self._lanes[lane])

    @property
    def num_tickets(self) -> int:
        """Tickets that were not released."""
        return len(self._tickets)

    def synchronize(self) -> None:
        """Runs all that was queued."""
        while self._under_way or self._executed < len(self._stream):
            assert self.step(), "the device waits for itself"

    def step(self) -> bool:
        """Lets one thing happen that may happen now; False if nothing may."""
        choices = [copy for copy in self._under_way if copy.barrier <= self._executed]
        pick = self._random.randrange(len(choices) + 1)
        if pick < len(choices):
            self._run(choices[pick])
            return True
        if self._executed < len(self._stream) and self._stream[self._executed]():
            self._executed += 1
            return True
        if choices:
            self._run(self._random.choice(choices))
        return bool(choices)

    def _run(self, copy: Copy) -> None:
        assert copy.source.tobytes() == copy.bytes_when_queued, "its host slot was overwritten"
        if not copy.started:
            clash = [o for o in self._under_way if o.started and o.slot == copy.slot]
            assert not clash, f"two copies write into slot {copy.slot} at once"
            copy.started = True
            for slots in self.slots.values():
                slots[copy.slot] = 0xAA
            return
        for name, begin, end in self._parts:
            self.slots[name][copy.slot] = copy.source[begin:end]
        copy.done = True
        self._under_way.remove(copy)

    def _maybe_fail(self, method: str) -> None:
        if method in self.fail:
            self.fail.discard(method)
            raise DeviceError(f"{method} failed")
