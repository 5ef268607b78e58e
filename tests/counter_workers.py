"""Workers that write counter files. Apart from the tests, so that a process that runs one imports
no torch."""

from __future__ import annotations

import signal
from multiprocessing.synchronize import Event
from pathlib import Path

from vllm_moe_offload.metrics import VALUES, CounterFile

LABELS = {"model_name": "demo", "engine": "0", "rank": "0"}
INFO = {"policy": "trace"}


def values_of(**given: float) -> list[float]:
    """All values, in order; those not given are 0."""
    return [float(given.get(name, 0)) for name in VALUES]


def count_up(path: Path, stop: Event) -> None:
    """Writes the same number as every value, then the next, until told to stop."""
    file = CounterFile(path, LABELS)
    number = 0.0
    while not stop.is_set():
        number += 1
        file.write([number] * len(VALUES))


def count_and_wait(path: Path, written: Event) -> None:
    """Writes some values and waits for its end."""
    file = CounterFile(path, LABELS, INFO)
    file.write(values_of(hits=10, misses=4, slots=8, resident_experts=6))
    written.set()
    signal.pause()
