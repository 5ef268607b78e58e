"""The cores that I/O threads may use.

vLLM's CPU worker binds its main thread to one core, and threads inherit that: reading would
then compete with the very core that computes. So the process's cores are noted when the
plugin registers, before anything is bound.
"""

from __future__ import annotations

import os

_cpus: list[int] = []


def remember() -> None:
    """Notes the cores of this process; later calls change nothing."""
    if not _cpus:
        _cpus.extend(sorted(os.sched_getaffinity(0)))


def io_cpus() -> list[int]:
    """Cores for I/O threads."""
    remember()
    return list(_cpus)
