"""The collection's file: saved soon after a change, never at the cost of another one."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from vllm_moe_offload.trace.collection import ActivationCollection
from vllm_moe_offload.trace.collection_file import CollectionFile

LAYERS, EXPERTS = 2, 4


def collection(fingerprint: str = "model", count: int = 0) -> ActivationCollection:
    made = ActivationCollection(LAYERS, EXPERTS, 10, fingerprint)
    for index in range(count):
        made.add(np.eye(EXPERTS)[[index % EXPERTS, 0]] + 1)
    return made


def test_what_one_server_learned_the_next_one_knows(tmp_path: Path) -> None:
    path = tmp_path / "a.msgpack"
    first = CollectionFile(path, collection(count=3))
    assert len(first.load()) == 3  # nothing there yet
    first.changed()
    first.close()
    assert path.stat().st_mode & 0o777 == 0o600
    second = CollectionFile(path, collection())
    assert len(second.load()) == 3
    assert second.collection.capacity == 10


def test_it_is_saved_without_being_asked(tmp_path: Path) -> None:
    path = tmp_path / "a.msgpack"
    file = CollectionFile(path, collection(), delay_s=0.01)
    file.load().add(np.ones((LAYERS, EXPERTS)))
    file.changed()
    deadline = time.monotonic() + 20
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(ActivationCollection.load(path)) == 1
    file.close()


def test_nothing_new_nothing_written(tmp_path: Path) -> None:
    file = CollectionFile(tmp_path / "a.msgpack", collection(count=1))
    file.load()
    file.close()
    assert not list(tmp_path.iterdir())


def test_a_foreign_or_damaged_file_is_left_alone(tmp_path: Path, caplog) -> None:
    path = tmp_path / "a.msgpack"
    collection("another model", 2).save(path)
    before = path.read_bytes()
    for content in (before, before[:-9], b"no collection"):
        path.write_bytes(content)
        file = CollectionFile(path, collection())
        caplog.clear()
        assert len(file.load()) == 0
        assert str(path) in caplog.text
        file.changed()
        file.close()
        assert path.read_bytes() == content


def test_only_the_writer_writes(tmp_path: Path) -> None:
    file = CollectionFile(tmp_path / "a.msgpack", collection(count=1), writes=False)
    file.load()
    file.changed()
    file.close()
    assert not list(tmp_path.iterdir())


def test_an_unwritable_directory_is_a_warning(tmp_path: Path, caplog) -> None:
    file = CollectionFile(tmp_path / "gone" / "a.msgpack", collection(count=1))
    file.load()
    file.changed()
    file.close()
    assert "cannot save activation matrices" in caplog.text


def test_a_disk_that_fills_up_is_a_warning(tmp_path: Path, caplog, monkeypatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    file = CollectionFile(tmp_path / "a.msgpack", collection(count=1))
    file.load()
    file.changed()
    monkeypatch.setattr("vllm_moe_offload.files.os.fsync", full_disk)
    file.close()
    assert "cannot save activation matrices: [Errno 28] No space left" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_collection_of_another_shape_is_left_alone(tmp_path: Path, caplog) -> None:
    path = tmp_path / "a.msgpack"
    made = ActivationCollection(LAYERS, EXPERTS + 1, 10, "model")
    made.save(path)
    file = CollectionFile(path, collection())
    assert file.load().num_experts == EXPERTS
    assert "is of 2 layers x 5 experts, this model has 2 x 4" in caplog.text
    file.changed()
    file.close()
    assert ActivationCollection.load(path).num_experts == EXPERTS + 1


def test_of_two_servers_the_first_one_keeps_its_matrices(tmp_path: Path, caplog) -> None:
    """The other one, which ends later, does not write over them."""
    path = tmp_path / "a.msgpack"
    first = CollectionFile(path, collection())
    second = CollectionFile(path, collection())
    first.load()
    with caplog.at_level(logging.WARNING, logger="vllm.moe_offload"):
        second.load()
    (record,) = caplog.records
    assert f"another server keeps its activation matrices in {path}" in record.getMessage()
    for file, count in ((first, 6), (second, 1)):
        for index in range(count):
            file.collection.add(np.eye(EXPERTS)[[index % EXPERTS, 0]] + index)
            file.changed()
    first.close()
    second.changed()
    second.close()
    assert len(ActivationCollection.load(path)) == 6
    third = CollectionFile(path, collection())
    assert len(third.load()) == 6
    third.collection.add(np.ones((LAYERS, EXPERTS)))
    third.changed()
    third.close()
    assert len(ActivationCollection.load(path)) == 7
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.msgpack"]


def test_what_a_killed_save_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "a.msgpack"
    code = f"""
import os, signal
from pathlib import Path
from vllm_moe_offload import files
from vllm_moe_offload.trace.collection import ActivationCollection
files.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
ActivationCollection(2, 4, 10).save(Path({str(path)!r}))
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    file = CollectionFile(path, collection())
    file.load()
    file.close()
    assert not list(tmp_path.iterdir())
