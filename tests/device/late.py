"""Events of a device that is as late as a test wants."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LateEvent:
    """Passed once so many later events were recorded, or when somebody waits for it."""

    stream: LateStream
    number: int
    was_waited_for: bool = False

    def query(self) -> bool:
        return self.was_waited_for or self.stream.passed >= self.number

    def synchronize(self) -> None:
        self.stream.num_waits += 1
        self.stream.pass_until(self.number)
        self.was_waited_for = True


@dataclass
class LateStream:
    """A stream that passes an event when ``late`` more were recorded.

    Attributes:
        passed: number of the last event that it has passed.
        num_waits: how often somebody waited for it.
    """

    late: int
    recorded: int = 0
    passed: int = 0
    num_waits: int = 0

    def record(self) -> LateEvent:
        self.recorded += 1
        self.pass_until(self.recorded - self.late)
        return LateEvent(self, self.recorded)

    def pass_until(self, number: int) -> None:
        self.passed = max(self.passed, number)
