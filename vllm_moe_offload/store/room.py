"""Disk space for a store that is to be built."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from vllm_moe_offload.store.errors import StoreError

MANIFEST_ALLOWANCE_BYTES = 8 << 20


def free_bytes(directory: Path) -> int:
    """What its file system has for this user."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def check_room(directory: Path, store_bytes: int, parent: Path, spare_bytes: int = 0) -> None:
    """Raises StoreError unless a store of ``store_bytes`` has room.

    Args:
        directory: of the store, for the message.
        store_bytes: of its experts.
        parent: a directory of that file system.
        spare_bytes: what will be deleted before it is built.
    """
    if free_bytes(parent) + spare_bytes < store_bytes + MANIFEST_ALLOWANCE_BYTES:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise StoreError(no_room(directory, full, store_bytes, parent))


def no_room(directory: Path, error: OSError, store_bytes: int | None, parent: Path) -> str:
    """The message that a disk is full; ``store_bytes`` None: not known yet."""
    reason = f"cannot write the expert store {directory}: {error}"
    if store_bytes is not None:
        reason += f"; it needs {store_bytes} bytes"
    return (
        f"{reason}; {free_bytes(parent)} are free; set store_dir to a directory on a disk "
        "with enough space"
    )
