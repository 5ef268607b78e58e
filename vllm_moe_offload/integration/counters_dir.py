"""Where workers leave their counters for the API servers of the same vLLM.

The directory's name travels in the environment: engine cores, workers and API servers are
children of the process that parsed the options. (In ``additional_config`` a random path
would change the hash that names vLLM's compilation cache.)
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

ENVIRONMENT = "VLLM_MOE_OFFLOAD_COUNTERS_DIR"


def counters_dir() -> Path | None:
    """The directory, or None in a process that does not belong to a server with offload."""
    value = os.environ.get(ENVIRONMENT)
    return Path(value) if value and os.path.isdir(value) else None


_created: set[Path] = set()
_at_exit: list[Callable[[Path], None]] = []


def ensure_counters_dir() -> Path:
    """The directory (0700), created and removed at exit by the first process that asks."""
    existing = counters_dir()
    # A main process that inherited the variable is another vLLM, started by this one's user:
    # only what multiprocessing started belongs to the same server.
    belongs = existing in _created or multiprocessing.parent_process() is not None
    if existing is not None and belongs:
        return existing
    path = Path(tempfile.mkdtemp(prefix="vllm-moe-offload-"))
    os.environ[ENVIRONMENT] = str(path)
    _created.add(path)
    atexit.register(_close, path, os.getpid())
    return path


def at_exit_of_creator(function: Callable[[Path], None]) -> None:
    """Calls ``function`` with the directory before it is removed, in its creator only.

    vLLM kills its workers when a server stops, so what is to be said or finished at the
    end has to be done here, from what they left.
    """
    if function not in _at_exit:
        _at_exit.append(function)


def _close(path: Path, creator: int) -> None:
    if os.getpid() != creator:  # a forked child
        return
    try:
        for function in _at_exit:
            function(path)
    finally:
        shutil.rmtree(path, ignore_errors=True)
