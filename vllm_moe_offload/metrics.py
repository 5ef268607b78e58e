"""Counters across processes: a worker writes a small mapped file, API servers read it.

Prometheus clients in vLLM's API servers cannot see the workers' memory, and there may be
several API servers. So every worker owns one file of 4 KiB (0600): a JSON header and its
checksum, then two snapshots of all values, written in turn. A snapshot carries a number and a
checksum: readers take the newest whole one, so that what they see belongs together, without
locks, even if the worker is killed while it writes. The worker holds a lock on its file (flock)
as long as it runs; the system lets go of it however the worker ends.

A worker on another host cannot write where API servers read. Its counters stay in its memory
(:class:`Counters`); the engine core asks for them and writes the file in its place
(``integration/remote_counters.py``). Such a file says since when it may be out of date.
"""

from __future__ import annotations

import fcntl
import json
import logging
import mmap
import os
import struct
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_moe_offload.cache.planner import COUNTER_NAMES
from vllm_moe_offload.files import open_regular

logger = logging.getLogger("vllm.moe_offload")

FILE_BYTES = 4096
HEADER_BYTES = 2048
COUNTERS = (
    *COUNTER_NAMES,
    "read_bytes",
    "stall_seconds",
    "busy_seconds",
    "policy_seconds",
    "tokens",
    "draft_hits",
    "draft_misses",
)
"""Values that only grow."""
GAUGES = ("slots", "resident_experts", "cache_bytes")
"""Values of now."""
VALUES = (*COUNTERS, *GAUGES)
"""What a counter file holds, in order."""
SUFFIX = ".counters"

SETTLE_SECONDS = 1.0
"""How long readers wait at most for the last figures of an engine that has just gone idle."""

# Number of the snapshot, values, and two times of the host's monotonic clock (0: none): since when
# the values may be out of date, and since when the last ones are on their way.
_CONTENT = struct.Struct(f"=Q{len(VALUES)}d2d")
_CHECKSUM = struct.Struct("=I")
_DESCRIPTION_BYTES = HEADER_BYTES - _CHECKSUM.size
_OFFSETS = (HEADER_BYTES, HEADER_BYTES + (FILE_BYTES - HEADER_BYTES) // 2)
_READ_ATTEMPTS = 100
_SETTLE_INTERVAL_SECONDS = 0.0005


class Counters:
    """What a worker counts, in its own memory.

    Attributes:
        labels: whose counters they are; the same after a restart.
        info: what else is to be known of this worker, such as its policy.
        worker: which process that is, in words: ``pid 17, host a``.
        path: the file that others read them from; None without.
        values: those written last, in the order of :data:`VALUES`.
    """

    def __init__(
        self, labels: Mapping[str, str], info: Mapping[str, str] | None = None, worker: str = ""
    ) -> None:
        """All values are 0."""
        self.labels = dict(labels)
        self.info = dict(info or {})
        self.worker = worker
        self.path: Path | None = None
        self.values: tuple[float, ...] = (0.0,) * len(VALUES)

    def write(self, values: Sequence[float]) -> None:
        """Remembers ``values``, in the order of :data:`VALUES`."""
        self.values = tuple(values)

    def close(self) -> None:
        """The worker ends. Safe to repeat."""


class CounterFile(Counters):
    """What a worker counts, in a file that other processes of the host read."""

    path: Path

    def __init__(
        self,
        path: Path,
        labels: Mapping[str, str],
        info: Mapping[str, str] | None = None,
        worker: str = "",
    ) -> None:
        """Creates ``path`` (0600), all values 0.

        Args:
            path: the file; its name ends in :data:`SUFFIX`.
            labels, info, worker: see :class:`Counters`.

        Raises:
            ValueError: labels, info and worker do not fit in 2044 bytes.
        """
        super().__init__(labels, info, worker)
        header = json.dumps(
            {"labels": self.labels, "info": self.info, "worker": worker}
        ).encode()
        if len(header) > _DESCRIPTION_BYTES:
            raise ValueError(
                f"labels and info of {len(header)} bytes do not fit in {_DESCRIPTION_BYTES}"
            )
        self.path = path
        self._number = 0
        temporary = path.with_suffix(".tmp")
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._file.truncate(FILE_BYTES)
        header = header.ljust(_DESCRIPTION_BYTES, b"\0")
        self._file.write(header + _CHECKSUM.pack(zlib.crc32(header)))
        self._map = mmap.mmap(descriptor, FILE_BYTES)
        self.write([0.0] * len(VALUES))
        os.rename(temporary, path)  # readers never see a file without labels and values

    def write(
        self, values: Sequence[float], stale_since: float = 0.0, settling_since: float = 0.0
    ) -> None:
        """Makes ``values`` what readers see.

        Args:
            values: in the order of :data:`VALUES`.
            stale_since: ``time.monotonic()`` since when the worker may have counted more than
                that; 0 if the values are those of now.
            settling_since: since when the worker has nothing to do and its last values are on
                their way, for which readers wait; 0 if none are.
        """
        super().write(values)
        self._number += 1
        content = _CONTENT.pack(self._number, *self.values, stale_since, settling_since)
        snapshot = content + _CHECKSUM.pack(zlib.crc32(content))
        begin = _OFFSETS[self._number % 2]
        self._map[begin : begin + len(snapshot)] = snapshot

    def close(self) -> None:
        """The worker ends; what it counted stays readable. Safe to repeat."""
        self._map.close()  # it has a descriptor of its own, which would keep the lock
        self._file.close()


@dataclass(frozen=True)
class CounterReading:
    """Counters at one moment.

    Attributes:
        labels: whose they are.
        infos: what is known of the workers, of each kind once.
        values: by their names in :data:`VALUES`.
        is_running: whether a worker stands behind them still.
        workers: which processes those are, in words.
        age_seconds: for how long a worker may have counted on since; 0 if it writes its
            counters itself, if it has nothing to do, and after its end.
    """

    labels: dict[str, str]
    infos: tuple[dict[str, str], ...]
    values: dict[str, float]
    is_running: bool
    workers: tuple[str, ...] = ()
    age_seconds: float = 0.0

    @property
    def name(self) -> str:
        """How messages name the worker."""
        return name_of(self.labels, "; ".join(self.workers))

    @property
    def hit_rate(self) -> float:
        """Hits over distinct experts needed; 1.0 before anything was needed."""
        return hit_rate(self.values["hits"], self.values["misses"])


def name_of(labels: Mapping[str, str], worker: str) -> str:
    """How messages name a worker: ``rank 1 (pid 17, host a)``."""
    return f"rank {labels['rank']}" + (f" ({worker})" if worker else "")


def hit_rate(hits: float, misses: float) -> float:
    """Share of needed experts that were resident; 1.0 if none was needed."""
    return hits / (hits + misses) if hits + misses else 1.0


def read_counters(directory: Path) -> Iterator[CounterReading]:
    """The counters of every worker that writes or wrote to ``directory``, by file name.

    A damaged file is left out with a warning: figures must not end what serves.
    """
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        try:
            with open_regular(path, follow=False) as file:
                described = _description(file.fileno())
                snapshot = _settled_snapshot(file.fileno())
                is_running = _is_locked(file.fileno())
        except FileNotFoundError:  # the server ends and removes the directory
            continue
        except OSError:
            described = snapshot = None
        if described is None or snapshot is None:
            if path not in _damaged:
                _damaged.add(path)
                logger.warning("MoE offload: %s holds no whole counters; left out", path)
            continue
        *values, stale_since, _ = snapshot
        yield CounterReading(
            described["labels"],
            (described["info"],),
            dict(zip(VALUES, values, strict=True)),
            is_running,
            tuple(filter(None, [described["worker"]])),
            time.monotonic() - stale_since if stale_since and is_running else 0.0,
        )


_damaged: set[Path] = set()


def merge(
    readings: Iterable[CounterReading], labels: Mapping[str, str] | None = None
) -> CounterReading:
    """What workers have counted together, since the first of them began.

    Counters are sums over all of them: they do not fall when a worker ends and another takes
    its place. Gauges and infos are those of workers that run; if none does any more, of all.
    """
    everyone = list(readings)
    running = [reading for reading in everyone if reading.is_running]
    current = running or everyone
    values = {name: sum(reading.values[name] for reading in everyone) for name in COUNTERS}
    values |= {name: sum(reading.values[name] for reading in current) for name in GAUGES}
    infos: list[dict[str, str]] = []
    for reading in current:
        infos += [info for info in reading.infos if info not in infos]
    return CounterReading(
        dict(labels or {}),
        tuple(infos),
        values,
        bool(running),
        tuple(dict.fromkeys(worker for reading in current for worker in reading.workers)),
        max((reading.age_seconds for reading in current), default=0.0),
    )


def merge_by_labels(readings: Iterable[CounterReading]) -> list[CounterReading]:
    """One reading for all workers that have the same labels, in the order they appear in."""
    groups: dict[tuple[tuple[str, str], ...], list[CounterReading]] = {}
    for reading in readings:
        groups.setdefault(tuple(sorted(reading.labels.items())), []).append(reading)
    return [merge(group, group[0].labels) for group in groups.values()]


def _description(descriptor: int) -> dict[str, Any] | None:
    """Labels, info and worker; None if they are not what was written."""
    header = os.pread(descriptor, HEADER_BYTES, 0)
    text, checksum = header[:_DESCRIPTION_BYTES], header[_DESCRIPTION_BYTES:]
    if checksum != _CHECKSUM.pack(zlib.crc32(text)):
        return None
    described: dict[str, Any] = json.loads(text.rstrip(b"\0"))
    return described


def _settled_snapshot(descriptor: int) -> tuple[float, ...] | None:
    """The newest snapshot; of an engine that has just gone idle, the one with its last figures.

    Whoever got the last answer may read at once, before those figures have come from another
    host. They come after the length of a message, or of a step that was begun in vain.
    """
    began = time.monotonic()
    while True:
        snapshot = _newest_snapshot(descriptor)
        settling_since = snapshot[-1] if snapshot is not None else 0.0
        waited_since = min(settling_since, began)  # none is longer than SETTLE_SECONDS
        if not settling_since or time.monotonic() - waited_since > SETTLE_SECONDS:
            return snapshot
        time.sleep(_SETTLE_INTERVAL_SECONDS)


def _newest_snapshot(descriptor: int) -> tuple[float, ...] | None:
    """Values and the two times behind them."""
    size = _CONTENT.size + _CHECKSUM.size
    for _ in range(_READ_ATTEMPTS):
        newest: tuple[float, ...] = ()
        for offset in _OFFSETS:
            snapshot = os.pread(descriptor, size, offset)
            content, checksum = snapshot[: _CONTENT.size], snapshot[_CONTENT.size :]
            if checksum == _CHECKSUM.pack(zlib.crc32(content)):
                newest = max(newest, _CONTENT.unpack(content))
        if newest:
            return newest[1:]
        # Both were written while they were read: the worker went on by two steps meanwhile.
    return None


def _is_locked(descriptor: int) -> bool:
    """Whether the worker that made the file runs."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
