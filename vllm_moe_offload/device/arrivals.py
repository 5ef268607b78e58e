"""What the host does once copies from the device have arrived, in order and without waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol


class Event(Protocol):
    """A place on the device's stream (``torch.cuda.Event``)."""

    def query(self) -> bool:
        """Whether the device has passed it."""

    def synchronize(self) -> None:
        """Returns once it has."""


class Arrivals:
    """Calls in the order in which they were asked for, each once what it needs has arrived.

    One queue for copies and for what happens between them: the end of a request is known before the
    routing of its last step is on the host.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[Event | None, Callable[[], object]]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def after(self, event: Event, call: Callable[[], object]) -> None:
        """``call`` needs what the device has copied when it passes ``event``."""
        self._waiting.append((event, call))

    def then(self, call: Callable[[], object]) -> None:
        """``call`` needs no more than that those before it were made."""
        self._waiting.append((None, call))

    def take_in(self) -> None:
        """Makes the calls that can be made; does not wait."""
        while self._waiting:
            event, call = self._waiting[0]
            if event is not None and not event.query():
                return
            self._waiting.popleft()
            call()

    def wait_for_all(self) -> None:
        """Makes all calls."""
        while self._waiting:
            event, call = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            call()
