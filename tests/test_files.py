"""Files that are whole or not there, and locks between processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vllm_moe_offload.files import (
    FileInUse,
    FileLock,
    open_regular,
    remove_unfinished,
    replacing,
)


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_a_file_is_replaced_whole_and_private(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(0o644)
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert names(tmp_path) == ["a"]


def test_file_and_directory_are_synced_before_and_after_the_rename(
    tmp_path: Path, monkeypatch
) -> None:
    """Else a power failure may leave an empty file under the name, or none."""
    done = []
    sync, rename = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        done.append("directory" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        sync(descriptor)

    def replace(*paths: str) -> None:
        done.append("rename")
        rename(*paths)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with replacing(tmp_path / "a") as file:
        file.write(b"new")
    assert done == ["file", "rename", "directory"]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def broken_off() -> None:
        with replacing(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_only_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "a.msgpack"
    code = f"""
import os, signal
from pathlib import Path
from vllm_moe_offload.files import replacing
with replacing(Path({str(path)!r})) as file:
    os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", code], check=False)
    assert ended.returncode == -signal.SIGKILL
    (left,) = names(tmp_path)
    kept = [".a.msgpack.swp", ".a.msgpackX12345678.new", ".b.msgpack.12345678.new"]
    for name in kept:
        (tmp_path / name).write_bytes(b"")
    linked = ".a.msgpack.12345678.new"
    (tmp_path / linked).symlink_to(tmp_path / kept[0])
    remove_unfinished(path)
    assert names(tmp_path) == sorted([*kept, linked])
    assert left not in names(tmp_path)


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a"
    lock = FileLock(path)
    with pytest.raises(FileInUse, match=r"another process holds .*/a\.lock"):
        FileLock(path)
    lock.release()
    lock.release()
    assert names(tmp_path) == []
    FileLock(path).release()


def test_a_lock_that_was_removed_while_it_was_opened_is_taken_at_its_name(
    tmp_path: Path, monkeypatch
) -> None:
    """The file that was opened is nobody's any more: two could hold locks on files of one name."""
    path = tmp_path / "a"
    first = FileLock(path)
    opened = []

    def opens(lock: Path) -> int:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT)
        if not opened:
            first.release()
        opened.append(os.fstat(descriptor).st_ino)
        return descriptor

    monkeypatch.setattr("vllm_moe_offload.files.open_lock", opens)
    second = FileLock(path)
    assert len(opened) == 2
    assert second.path.stat().st_ino == opened[1]
    with pytest.raises(FileInUse):
        FileLock(path)
    second.release()


def test_a_killed_holder_holds_nothing_though_a_child_that_it_forked_lives(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a"
    code = f"""
import os, time
from pathlib import Path
from vllm_moe_offload.files import FileLock
lock = FileLock(Path({str(path)!r}))
child = os.fork()
if not child:
    lock.release()  # has none, so the parent's stays
    time.sleep(600)
print(child, flush=True)
time.sleep(600)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        time.sleep(0.1)
        with pytest.raises(FileInUse):
            FileLock(path)
        holder.kill()
        holder.wait()
        os.kill(child, 0)
        FileLock(path).release()
    finally:
        os.kill(child, signal.SIGKILL)
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_a_lock_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"a\.lock"):
        FileLock(tmp_path / "a")


def test_nothing_is_read_from_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="no regular file"):
            open_regular(path)
    (tmp_path / "a").write_bytes(b"text")
    with open_regular(tmp_path / "a") as file:
        assert file.read() == b"text"
