"""The kernel's page cache: emptied, filled, and what is read ahead into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
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


def read_ahead_of(path: Path) -> Path | None:
    """The setting of the disk of a file, KiB; None if its file system is on no single disk."""
    number = path.stat().st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    # A partition has none of its own: the queue is its disk's.
    for queue in (device / "queue", device / ".." / "queue"):
        if (queue / "read_ahead_kb").exists():
            return queue / "read_ahead_kb"
    return None


@contextmanager
def read_ahead(path: Path, kib: int | None) -> Iterator[None]:
    """Files on the disk of ``path`` that are opened meanwhile are read ahead by ``kib``.

    They keep that; files that are open already keep theirs. None: as the disk has it.

    Raises:
        RuntimeError: it cannot be set.
    """
    if kib is None:
        yield
        return
    setting = read_ahead_of(path)
    if setting is None:
        raise RuntimeError(f"{path} is on no single disk: its read-ahead cannot be set")
    before = setting.read_text()
    setting.write_text(f"{kib}\n")
    try:
        yield
    finally:
        setting.write_text(before)


def warm_page_cache(directory: Path) -> None:
    """Reads all files once, as a start would find them after another."""
    buffer = bytearray(8 << 20)
    for path in sorted(directory.glob("*")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
