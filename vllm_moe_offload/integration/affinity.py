"""The cores that I/O threads may use.

vLLM's CPU worker binds its main thread and every compute thread to one core each, and threads
inherit that. A reader on a computing core takes time from the kernel, and is itself put off
while the kernel runs: prefetches then hardly progress. So readers get the cores that this
process may use and on which nothing computes.
"""

from __future__ import annotations

import os
from pathlib import Path

_cpus: list[int] = []


def remember() -> None:
    """Notes the cores of this process before anything is bound; later calls change nothing."""
    if not _cpus:
        _cpus.extend(sorted(os.sched_getaffinity(0)))


def io_cpus() -> list[int]:
    """Cores for I/O threads: those without a bound thread, or all if every core has one."""
    remember()
    computing = _bound_cores()
    return [core for core in _cpus if core not in computing] or list(_cpus)


def _bound_cores() -> set[int]:
    """Cores to which a thread of this process is bound alone."""
    bound = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            cores = os.sched_getaffinity(int(task.name))
        except ProcessLookupError:
            continue  # ended meanwhile
        if len(cores) == 1:
            bound |= cores
    return bound
