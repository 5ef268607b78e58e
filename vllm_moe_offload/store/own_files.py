"""Which files a server believes: whose they are, who may write to them, and what they are.

Whoever can write to a store decides which weights are served.

====================  ==============================  ==================================
what is found         what the plugin made            the user's own ``store_dir``
====================  ==============================  ==================================
another owner         refused; root is warned         refused; root is warned
all may write         refused                         a warning, unless it is sticky
the group may write   a warning                       a warning, unless it is sticky
a symbolic link       not followed                    followed
====================  ==============================  ==================================

Root is only warned: in a container it is often the server's user, and the volume somebody else's.
So is whoever has a group that may write: it is often a group of one, or that of a volume
which a cluster hands from one container to the next. Where the file system keeps no modes (what
is made with 0700 shows another), all is a warning: nothing could be done about it.
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from pathlib import Path

from vllm_moe_offload.files import open_regular
from vllm_moe_offload.store.errors import StoreError, in_one_line

logger = logging.getLogger("vllm.moe_offload")


def read_regular(path: Path, most_bytes: int) -> bytes:
    """The content of a file that is no link, pipe or device.

    Raises:
        OSError: it is one, cannot be read, or is longer than ``most_bytes``.
    """
    with open_regular(path, follow=False) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            raise OSError(f"it has {size} bytes, {most_bytes} at most are read")
        return file.read(most_bytes)


def check_owner(path: Path, status: os.stat_result, store_dir: Path) -> None:
    """Raises StoreError if ``path``, of ``status``, is another user's; root is warned."""
    owner, user = status.st_uid, os.geteuid()
    if owner == user:
        return
    if user:
        raise StoreError(
            f"{path} belongs to user {owner}, not to you (user {user}) "
            f"(store_dir={str(store_dir)!r}); set store_dir to a directory of your own"
        )
    _warn_once(
        path, "MoE offload: %s belongs to user %d, who can change what root serves", path, owner
    )


def check_writers(path: Path, status: os.stat_result, model_dir: Path) -> None:
    """Raises StoreError if every user may write to ``path``; for the group, warns.

    Args:
        path: of a store.
        status: its.
        model_dir: the directory of the model's stores; one warning for all of it.
    """
    mode = stat.S_IMODE(status.st_mode)
    if mode & stat.S_IWOTH and _keeps_modes(model_dir):
        raise StoreError(
            f"every user may write to {path} (mode {mode:04o}), and so choose what is served; "
            f"delete it, or, if you trust all of them, chmod -R go-w {model_dir}"
        )
    _warn_of_writers(model_dir, path, mode)


def check_writers_of_store_dir(store_dir: Path, status: os.stat_result) -> None:
    """Warns if others may replace what lies in ``store_dir``."""
    if not status.st_mode & stat.S_ISVTX:
        _warn_of_writers(store_dir, store_dir, stat.S_IMODE(status.st_mode))


def _warn_of_writers(place: Path, path: Path, mode: int) -> None:
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        _warn_once(
            place,
            "MoE offload: %s may write to %s (mode %04o), and so choose what is served; if that "
            "is not meant: chmod go-w",
            "every user" if mode & stat.S_IWOTH else "its group",
            path,
            mode,
        )


def _keeps_modes(directory: Path) -> bool:
    """Whether its file system does; true if nothing can be made there to see it."""
    try:
        with tempfile.TemporaryDirectory(dir=directory, prefix=".modes-") as made:
            return not stat.S_IMODE(os.stat(made).st_mode) & stat.S_IWOTH
    except OSError:
        return True


_warned: set[tuple[Path, str]] = set()


def _warn_once(place: Path, message: str, *arguments: object) -> None:
    """Once for a place in each process."""
    if (place, message) not in _warned:
        _warned.add((place, message))
        logger.warning(
            message, *(in_one_line(str(a)) if isinstance(a, Path) else a for a in arguments)
        )
