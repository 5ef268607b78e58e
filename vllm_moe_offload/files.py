"""Files that are whole or not there, and files that one process at a time has for itself."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_NEW = ".new"
"""How the name of a file ends that is still being written."""


class FileInUse(OSError):
    """Another process holds the lock; the message names the lock's file."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file (0600) that takes the place of ``path`` when the block ends without an error.

    Whoever opens ``path`` finds the old file or the new one, whole, after a power failure too.

    Raises:
        OSError: it cannot be written; ``path`` is as it was, and nothing is left beside it.
    """
    descriptor, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.", suffix=_NEW
    )
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def remove_unfinished(path: Path) -> None:
    """Removes what :func:`replacing` left beside ``path`` in processes that were killed.

    To be called by the only process that writes ``path``, as :class:`FileLock` makes it.

    Raises:
        OSError: the directory cannot be read, or a file not be removed.
    """
    name = re.compile(rf"\.{re.escape(path.name)}\.\w{{8}}{re.escape(_NEW)}")
    with os.scandir(path.parent) as entries:
        for entry in entries:
            if name.fullmatch(entry.name) and is_own_file(entry.stat(follow_symlinks=False)):
                os.unlink(entry.path)


def open_regular(path: Path, *, follow: bool = True) -> IO[bytes]:
    """Opens a file to read it, if it is one: nothing is waited for that a pipe or device may give.

    ``follow``: whether a link at ``path`` may lead to it.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no regular file")
    return os.fdopen(descriptor, "rb")


def is_own_file(status: os.stat_result) -> bool:
    """Whether it is a regular file of this process's user."""
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()


def sync_directory(path: Path) -> None:
    """Makes renames in ``path`` survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_lock(path: Path) -> int:
    """Descriptor of a file (0600, no link) to be locked with ``flock``; created if it is missing."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


class FileLock:
    """Makes this process the only writer of ``path``, from construction to :meth:`release`.

    What is locked is ``<path>.lock``, since ``path`` itself is replaced by renaming. The kernel
    releases the lock of a process that ends, however it ends; children that the process forked
    and that outlive it do not hold it.

    Attributes:
        path: the lock's file; removed by :meth:`release`.
    """

    def __init__(self, path: Path) -> None:
        """Takes the lock or raises at once.

        Raises:
            FileInUse: another process holds it, or this one by another object.
            OSError: the lock's file cannot be made.
        """
        self.path = path.with_name(f"{path.name}.lock")
        self._file: IO[bytes] | None = self._locked()
        _held.add(self)

    def _locked(self) -> IO[bytes]:
        while True:
            file = os.fdopen(open_lock(self.path), "r+b")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_at_its_name(file):
                    return file
            except BlockingIOError:
                file.close()
                raise FileInUse(f"another process holds {self.path}") from None
            except OSError:
                file.close()
                raise
            file.close()

    def _is_at_its_name(self, file: IO[bytes]) -> bool:
        """False if whoever held the lock removed the file after it was opened here."""
        try:
            there = self.path.lstat()
        except FileNotFoundError:
            return False
        return os.path.samestat(os.fstat(file.fileno()), there)

    def release(self) -> None:
        """Lets others have it; safe to call again, and by forked children, which have none."""
        if self._file is None:
            return
        try:
            self.path.unlink(missing_ok=True)
        finally:
            self.forget()

    def forget(self) -> None:
        """Closes the file without releasing the lock of a process that has it open, too."""
        if self._file is not None:
            self._file.close()
            self._file = None


_held: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _forget_all() -> None:
    for lock in _held:
        lock.forget()


# A lock of flock's belongs to the open file, which a forked child shares: it would keep the lock
# until the last such child ends.
os.register_at_fork(after_in_child=_forget_all)
