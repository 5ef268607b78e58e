"""Who may write to a store: others are refused, a group is told of, and so is root."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tests.stores import build, place
from vllm_moe_offload.store import StoreBuilder, StoreError, open_store, own_files, store_lock
from vllm_moe_offload.store.directory import prepare_directory
from vllm_moe_offload.store.shelf import remove, shelved_models


@pytest.fixture(autouse=True)
def _nothing_was_told(monkeypatch) -> None:
    monkeypatch.setattr(own_files, "_warned", set())


OF_A_STORE = ["..", ".", "manifest.json", "experts.bin"]


def allow(path: Path, bits: int) -> None:
    path.chmod(stat.S_IMODE(path.stat().st_mode) | bits)


@pytest.mark.parametrize("name", OF_A_STORE)
def test_what_every_user_may_write_is_refused(tmp_path, name):
    store = build(tmp_path)
    allow(store.directory / name, stat.S_IWOTH)
    with pytest.raises(StoreError, match=r"every user may write to .*chmod -R go-w ") as error:
        open_store(store.directory, store.identity)
    assert type(error.value) is StoreError, "it is no damage: nothing is deleted"
    (shelved,) = shelved_models(tmp_path)
    assert "every user may write" in shelved.state
    remove(shelved)
    assert not store.directory.exists()


@pytest.mark.parametrize("name", OF_A_STORE)
def test_what_a_group_may_write_is_told_once(tmp_path, caplog, name):
    store = build(tmp_path)
    allow(store.directory / name, stat.S_IWGRP)
    for _ in range(2):
        assert open_store(store.directory, store.identity) == store
    (record,) = caplog.records
    assert "its group may write to" in record.getMessage()


def test_what_only_its_owner_may_write_is_not_spoken_of(tmp_path, caplog):
    store = build(tmp_path)
    assert open_store(store.directory, store.identity) == store
    assert not caplog.records


def test_nothing_is_built_where_every_user_may_write(tmp_path):
    directory, which = place(tmp_path)
    with store_lock(directory):
        directory.parent.chmod(0o777)
        with (
            pytest.raises(StoreError, match="every user may write"),
            StoreBuilder(directory, which, 1, 1),
        ):
            pass
    assert not list(directory.parent.glob("*.building-*"))


def test_where_modes_are_not_kept_it_is_told(tmp_path, caplog, monkeypatch):
    """Some file systems show one mode for all files, which nobody can change."""
    store = build(tmp_path)
    seen = os.stat

    def writable(path, *arguments, **more):
        status = list(seen(path, *arguments, **more))
        status[0] |= 0o777
        return os.stat_result(status)

    allow(store.path, stat.S_IWOTH)
    monkeypatch.setattr(own_files.os, "stat", writable)
    assert open_store(store.directory, store.identity) == store
    assert "every user may write to" in caplog.text


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        (0o755, None),
        (0o775, "its group may write"),
        (0o777, "every user may write"),
        (0o1777, None),
    ],
)
def test_a_store_dir_is_the_users_own_affair(tmp_path, caplog, mode, words):
    store_dir = tmp_path / "stores"
    store_dir.mkdir()
    store_dir.chmod(mode)
    for _ in range(2):
        prepare_directory(store_dir, store_dir)
    assert [words in record.getMessage() for record in caplog.records] == [True] * bool(words)


def test_a_store_dir_may_be_a_link_and_what_lies_in_it_may_not(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "stores").symlink_to(tmp_path / "disk")
    store = build(tmp_path / "stores")
    assert open_store(store.directory, store.identity) == store
    model_dir = store.directory.parent
    model_dir.rename(tmp_path / "elsewhere")
    model_dir.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="is a symbolic link"), store_lock(store.directory):
        pass


def test_another_owner_is_refused_and_root_is_told(tmp_path, caplog, monkeypatch):
    status = list(tmp_path.stat())
    status[4] = 1234
    of_another = os.stat_result(status)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(StoreError, match=r"belongs to user 1234, not to you \(user 1000\)"):
        own_files.check_owner(tmp_path, of_another, tmp_path)
    assert not caplog.records
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    for _ in range(2):
        own_files.check_owner(tmp_path, of_another, tmp_path)
    (record,) = caplog.records
    assert "belongs to user 1234, who can change what root serves" in record.getMessage()


def test_a_link_left_beside_a_store_is_not_taken_for_a_build(tmp_path):
    directory, _ = place(tmp_path)
    (tmp_path / "precious").mkdir()
    with store_lock(directory):
        directory.with_name("whole.building-1-00").symlink_to(tmp_path / "precious")
    build(tmp_path)
    assert (tmp_path / "precious").is_dir()
