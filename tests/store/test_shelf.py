"""What lies in a store_dir: whole, unfinished, damaged, of somebody else."""

from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path

import pytest

from tests.stores import build
from vllm_moe_offload.files import FileLock
from vllm_moe_offload.rank import Rank
from vllm_moe_offload.store import StoreError, store_lock
from vllm_moe_offload.store.shelf import log_others, others_of, remove, shelved_models


def test_stores_are_listed_with_what_they_take(tmp_path: Path) -> None:
    first, second = build(tmp_path), build(tmp_path, vllm_version="0.33.0")
    (tmp_path / "notes").mkdir()
    (tmp_path / "demo-0123456789abcdef").symlink_to(first.directory.parent)
    shelved = shelved_models(tmp_path)
    assert {one.directory for one in shelved} == {
        first.directory.parent,
        second.directory.parent,
    }
    for one in shelved:
        assert one.model == "model"
        assert one.state == "complete"
        assert one.nbytes >= first.file_bytes
        assert one.built > 0


def test_a_directory_that_is_not_there_has_no_stores(tmp_path: Path) -> None:
    assert shelved_models(tmp_path / "nowhere") == []


def test_every_rank_must_be_there(tmp_path: Path) -> None:
    build(tmp_path, rank=Rank(tp_size=2))
    assert [one.state for one in shelved_models(tmp_path)] == ["1 of 2 parts are here"]
    build(tmp_path, rank=Rank(tp=1, tp_size=2))
    assert [one.state for one in shelved_models(tmp_path)] == ["complete"]


def test_a_part_of_the_format_before_is_listed(tmp_path: Path) -> None:
    store = build(tmp_path)
    manifest = store.directory / "manifest.json"
    document = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(document | {"format_version": 1}))
    store.directory.rename(store.directory.with_name("rank0of1"))
    (shelved,) = shelved_models(tmp_path)
    assert "has format version 1, this code reads 2" in shelved.state
    assert not shelved.is_leftover, "it stays where it is, and is no room for another"


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    store = build(tmp_path)
    manifest = store.directory / "manifest.json"
    document = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(document | {"format_version": 0}))
    (shelved,) = shelved_models(tmp_path)
    assert "has format version 0" in shelved.state
    assert shelved.parts == ()
    manifest.write_text(json.dumps(document))
    os.truncate(store.path, 10)
    (shelved,) = shelved_models(tmp_path)
    assert "has 10 bytes instead of" in shelved.state


def test_a_build_that_was_killed_is_not_finished(tmp_path: Path) -> None:
    store = build(tmp_path)
    store.directory.rename(store.directory.with_name("whole.building-1-00"))
    (shelved,) = shelved_models(tmp_path)
    assert shelved.state == "not finished"
    assert shelved.is_leftover
    assert shelved.nbytes >= store.file_bytes


def test_other_stores_of_a_model_are_those_of_its_name(tmp_path: Path, caplog) -> None:
    mine, other = build(tmp_path), build(tmp_path, checkpoint="beef")
    stranger = build(tmp_path, dtype="float32").directory.parent
    stranger.rename(stranger.with_name(f"another-{stranger.name[-16:]}"))
    found = list(others_of(mine.directory.parent))
    assert [one.directory for one in found] == [other.directory.parent]
    with caplog.at_level(logging.INFO, logger="vllm.moe_offload"):
        log_others(stranger.with_name(f"another-{stranger.name[-16:]}"))
        assert not caplog.records
        log_others(mine.directory.parent)
    (record,) = caplog.records
    assert "1 other store(s) of a model of this name take" in record.getMessage()
    assert str(tmp_path) in record.getMessage()


def test_a_drafters_store_is_the_models_own(tmp_path: Path) -> None:
    """It is no other one of the same model, and lies in the last pipeline stage alone."""
    model = build(tmp_path, rank=Rank(pp_size=2), stages=(0, 2))
    drafter = build(tmp_path, rank=Rank(pp=1, pp_size=2), stages=(4,))
    assert list(others_of(model.directory.parent)) == []
    states = {one.directory: one.state for one in shelved_models(tmp_path)}
    assert states[drafter.directory.parent] == "complete, a drafter's"
    assert states[model.directory.parent] == "1 of 2 parts are here"


def test_what_is_removed_is_gone_and_the_rest_is_not(tmp_path: Path) -> None:
    first, second = build(tmp_path), build(tmp_path, checkpoint="beef")
    (shelved,) = others_of(second.directory.parent)
    remove(shelved)
    assert not first.directory.exists()
    assert [one.directory for one in shelved_models(tmp_path)] == [second.directory.parent]
    assert second.path.exists()
    build(tmp_path)  # and can be built again
    assert len(shelved_models(tmp_path)) == 2


def test_removing_waits_for_a_build(tmp_path: Path) -> None:
    store = build(tmp_path)
    (shelved,) = shelved_models(tmp_path)
    thread = threading.Thread(target=remove, args=[shelved])
    with store_lock(store.directory):
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert store.path.exists()
    thread.join()
    assert not store.directory.exists()


def test_what_cannot_be_deleted_is_an_error(tmp_path: Path, monkeypatch) -> None:
    build(tmp_path)
    (shelved,) = shelved_models(tmp_path)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("vllm_moe_offload.store.directory.shutil.rmtree", refuse)
    with pytest.raises(StoreError, match=r"cannot delete .*Permission denied"):
        remove(shelved)


@pytest.mark.parametrize("call", ["os.lstat", "Path.iterdir"])
def test_what_cannot_be_read_is_said_and_stops_nobody(
    tmp_path: Path, monkeypatch, call
) -> None:
    mine, other = build(tmp_path), build(tmp_path, checkpoint="beef")
    iterdir, lstat = Path.iterdir, os.lstat

    def refused(path, original):
        if str(path).startswith(str(other.directory.parent)):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    if call == "os.lstat":
        monkeypatch.setattr(
            "vllm_moe_offload.store.shelf.os.lstat", lambda path: refused(path, lstat)
        )
    else:
        monkeypatch.setattr(Path, "iterdir", lambda path: refused(path, iterdir))
    log_others(mine.directory.parent)  # as a start does
    states = {one.directory: one.state for one in shelved_models(tmp_path)}
    assert states[mine.directory.parent] == "complete"
    assert "cannot be read: " in states[other.directory.parent]


def test_a_server_that_keeps_activation_matrices_there_is_not_waited_for(
    tmp_path: Path,
) -> None:
    """It does so until it ends, and it has its store open."""
    model_dir = build(tmp_path).directory.parent
    kept = model_dir / "activations.msgpack"
    kept.touch()
    lock = FileLock(kept)
    removing = threading.Thread(target=remove, args=shelved_models(tmp_path), daemon=True)
    removing.start()
    removing.join(20)
    assert not removing.is_alive()
    assert shelved_models(tmp_path) == []
    assert lock.path.exists()
    lock.release()
