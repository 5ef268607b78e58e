"""Counters across processes: a worker writes a small mapped file, API servers read it.

Prometheus clients in vLLM's API servers cannot see the workers' memory, and there may be
several API servers. So every worker owns one file of 4 KiB (0600): a JSON header, then
float64 values in the order of :data:`VALUES`, each written whole.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.cache import COUNTER_NAMES

FILE_BYTES = 4096
HEADER_BYTES = 2048
VALUES = (
    *COUNTER_NAMES,
    "read_bytes",
    "stall_seconds",
    "busy_seconds",
    "policy_seconds",
    "tokens",
    "resident_experts",
)
"""What a counter file holds, in order; all but the last only grow."""
SUFFIX = ".counters"


class CounterFile:
    """The worker's end: ``values`` is the mapped float64 array ``[len(VALUES)]``."""

    def __init__(self, path: Path, labels: Mapping[str, str | int]) -> None:
        """Creates ``path`` (0600). ``labels`` (JSON) must fit in 2 KiB."""
        header = json.dumps(labels).encode()
        if len(header) > HEADER_BYTES:
            raise ValueError(f"labels of {len(header)} bytes do not fit in {HEADER_BYTES}")
        self.path = path
        temporary = path.with_suffix(".tmp")
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.ftruncate(descriptor, FILE_BYTES)
            os.pwrite(descriptor, header, 0)
            self._map = mmap.mmap(descriptor, FILE_BYTES)
        finally:
            os.close(descriptor)
        os.rename(temporary, path)  # readers never see a half-written header
        self.values: npt.NDArray[np.float64] = np.frombuffer(
            self._map, np.float64, len(VALUES), HEADER_BYTES
        )


@dataclass(frozen=True)
class CounterReading:
    """One worker's counters at one moment."""

    labels: dict[str, str | int]
    values: dict[str, float]

    @property
    def hit_rate(self) -> float:
        """Hits over distinct experts needed; 1.0 before anything was needed."""
        return hit_rate(self.values["hits"], self.values["misses"])


def hit_rate(hits: float, misses: float) -> float:
    """Share of needed experts that were resident; 1.0 if none was needed."""
    return hits / (hits + misses) if hits + misses else 1.0


def read_counters(directory: Path) -> Iterator[CounterReading]:
    """The counters of every worker that writes to ``directory``, by rank."""
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        data = path.read_bytes()
        header, _, _ = data[:HEADER_BYTES].partition(b"\0")
        values = np.frombuffer(data, np.float64, len(VALUES), HEADER_BYTES)
        yield CounterReading(
            json.loads(header), dict(zip(VALUES, values.tolist(), strict=True))
        )
