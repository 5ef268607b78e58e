"""The kernel's page cache, emptied or filled."""

from __future__ import annotations

import os
from pathlib import Path


def drop_caches() -> None:
    """Empties the page cache. Raises PermissionError unless root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def forget(file: Path) -> None:
    """Drops a file from the page cache, so that whoever reads it next is charged for it.

    Pages that some process has mapped stay.
    """
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # pages that are not written yet would stay, too
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def warm_page_cache(directory: Path) -> None:
    """Reads all files once, as a start would find them after another."""
    buffer = bytearray(8 << 20)
    for path in sorted(directory.glob("*")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
