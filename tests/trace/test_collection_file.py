"""The collection's file: saved soon after a change, never at the cost of another one."""

from __future__ import annotations

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
    file = CollectionFile(path, collection(count=1), delay_s=0.01)
    file.changed()
    deadline = time.monotonic() + 20
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(ActivationCollection.load(path)) == 1
    file.close()


def test_nothing_new_nothing_written(tmp_path: Path) -> None:
    file = CollectionFile(tmp_path / "a.msgpack", collection(count=1))
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
    file.changed()
    file.close()
    assert not list(tmp_path.iterdir())


def test_an_unwritable_directory_is_a_warning(tmp_path: Path, caplog) -> None:
    file = CollectionFile(tmp_path / "gone" / "a.msgpack", collection(count=1))
    file.changed()
    file.close()
    assert "cannot save activation matrices" in caplog.text
