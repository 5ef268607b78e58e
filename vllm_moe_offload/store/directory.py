"""Directories of stores: who may use them, and one builder at a time."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from vllm_moe_offload.files import open_lock
from vllm_moe_offload.store.errors import StoreError
from vllm_moe_offload.store.own_files import (
    check_owner,
    check_writers,
    check_writers_of_store_dir,
)

logger = logging.getLogger("vllm.moe_offload")


def prepare_store_dir(directory: Path) -> None:
    """Creates the directories above a store's ``directory`` (0700) and checks them.

    ``directory`` is as :meth:`StoreIdentity.directory` gives it; the directory two levels
    up is the option ``store_dir``.

    Raises:
        StoreError: names ``store_dir``: not a directory, not writable, another user's, or, of
            the model's directory in it, a link.
    """
    model_dir = directory.parent
    for path in (model_dir.parent, model_dir):
        prepare_directory(path, model_dir.parent)


def prepare_directory(path: Path, store_dir: Path) -> None:
    """Creates ``path`` (0700), which is ``store_dir`` or lies in it, and checks it.

    Raises:
        StoreError: as :func:`prepare_store_dir`.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"cannot create {path} for the expert store: {error}; set store_dir to a "
            "directory that you may write to"
        ) from error
    if path == store_dir:
        check_writers_of_store_dir(path, path.stat())
    elif path.is_symlink():
        raise StoreError(
            f"{path} is a symbolic link, which is not followed; move what it leads to there, or "
            "make store_dir the link"
        )
    check_owner(path, path.stat(), store_dir)
    if not os.access(path, os.W_OK | os.X_OK):
        raise StoreError(
            f"{path} is not writable (store_dir={str(store_dir)!r}); set store_dir to a "
            "directory of your own"
        )


@contextlib.contextmanager
def store_lock(directory: Path) -> Iterator[None]:
    """Holds ``<directory>.lock``, so that servers that share a store build it once.

    Waits, and says so in the log, while another process holds it. The kernel releases the
    lock of a process that dies. The file stays: removing it would let two processes hold
    locks on two files of one name.

    Raises:
        StoreError: as :func:`prepare_store_dir`, or the lock file cannot be made.
    """
    prepare_store_dir(directory)
    path = directory.with_name(f"{directory.name}.lock")
    try:
        descriptor = open_lock(path)
    except OSError as error:
        raise StoreError(
            f"cannot open the lock {path}: {error}; set store_dir to a directory of your own"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("MoE offload: waiting for another process that uses %s", path)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def building_directory(directory: Path) -> Iterator[Path]:
    """A fresh ``<directory>.building-<pid>-<random>`` (0700), removed at exit if it is left.

    Holds a lock on the directory itself, which tells it from what a killed builder left
    behind; such leftovers are removed first. Call it under :func:`store_lock`.

    Raises:
        StoreError: the directory cannot be made, or every user may write there.
    """
    prepare_store_dir(directory)
    check_writers(directory.parent, directory.parent.stat(), directory.parent)
    _remove_leftovers(directory)
    path = directory.with_name(f"{directory.name}.building-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        path.mkdir(mode=0o700)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise StoreError(f"cannot create {path} for the expert store: {error}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield path
    finally:
        # After a commit it has another name, and nothing is left under this one.
        try:
            if path.exists():
                shutil.rmtree(path)
        finally:
            os.close(descriptor)


def _remove_leftovers(directory: Path) -> None:
    for path in directory.parent.glob(f"{directory.name}.building-*"):
        if path.is_symlink() or not path.is_dir():
            continue
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # its builder lives
        else:
            logger.info("MoE offload: removing %s, left by a build that was killed", path)
            shutil.rmtree(path)
        finally:
            os.close(descriptor)


def delete(path: Path) -> None:
    """Deletes what lies there, whatever it is. Who has it open keeps it until it is closed.

    Raises:
        StoreError: it cannot be deleted.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        raise StoreError(f"cannot delete {path}: {error}") from error
