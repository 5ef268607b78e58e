"""Where workers leave their counters for the API servers of the same vLLM.

The directory's name travels in the environment: engine cores, workers and API servers are
children of the process that parsed the options. (In ``additional_config`` a random path
would change the hash that names vLLM's compilation cache.)
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

ENVIRONMENT = "VLLM_MOE_OFFLOAD_COUNTERS_DIR"


def counters_dir() -> Path | None:
    """The directory, or None in a process that does not belong to a server with offload."""
    value = os.environ.get(ENVIRONMENT)
    return Path(value) if value and os.path.isdir(value) else None


def ensure_counters_dir() -> Path:
    """The directory (0700), created and removed at exit by the first process that asks."""
    existing = counters_dir()
    if existing is not None:
        return existing
    path = Path(tempfile.mkdtemp(prefix="vllm-moe-offload-"))
    os.environ[ENVIRONMENT] = str(path)
    creator = os.getpid()

    def remove() -> None:
        if os.getpid() == creator:
            shutil.rmtree(path, ignore_errors=True)

    atexit.register(remove)
    return path
