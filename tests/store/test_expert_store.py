"""Opening a store: what was built opens, and nothing else does."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from tests.stores import MIXED, build, layout_of, place
from vllm_moe_offload.store import DamagedStore, StoreError, joined, open_store


def test_reopened_store_equals_the_built_one(tmp_path):
    built = build(tmp_path)
    assert open_store(built.directory, built.identity, MIXED) == built
    assert open_store(built.directory, None) == built
    assert (built.num_layers, built.num_experts, built.layout) == (3, 4, MIXED)


def test_missing_store_is_none(tmp_path):
    directory, which = place(tmp_path)
    assert open_store(directory, which) is None


def test_record_offset_outside_the_model_is_an_error(tmp_path):
    store = build(tmp_path)
    for layer, expert in ((3, 0), (0, 4), (-1, 0), (0, -1)):
        with pytest.raises(IndexError, match=f"expert {expert} of layer {layer}"):
            store.record_offset(layer, expert)


def test_store_of_another_user_does_not_open(tmp_path, monkeypatch):
    store = build(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(StoreError, match=r"belongs to user.*store_dir"):
        open_store(store.directory, store.identity)


@pytest.mark.parametrize("change", [-1, 1, -4096])
def test_wrong_size_does_not_open(tmp_path, change):
    store = build(tmp_path)
    os.truncate(store.path, store.file_bytes + change)
    with pytest.raises(
        DamagedStore, match=rf"experts\.bin has .* bytes instead of {store.file_bytes}"
    ):
        open_store(store.directory, store.identity)


@pytest.mark.parametrize("name", ["experts.bin", "manifest.json"])
def test_missing_file_does_not_open(tmp_path, name):
    store = build(tmp_path)
    (store.directory / name).unlink()
    with pytest.raises(DamagedStore, match=rf"cannot read .*{name}"):
        open_store(store.directory, store.identity)


def test_store_of_another_model_does_not_open(tmp_path):
    store = build(tmp_path)
    directory, which = place(tmp_path, checkpoint="another")
    directory.parent.mkdir()
    shutil.copytree(store.directory, directory)
    with pytest.raises(
        DamagedStore, match=r"another model.*checkpoint: 'c0ffee', not 'another'"
    ):
        open_store(directory, which)


def test_other_layout_does_not_open(tmp_path):
    store = build(tmp_path)
    with pytest.raises(DamagedStore, match="its experts hold"):
        open_store(store.directory, store.identity, layout_of(4096))


def edit(manifest: dict, **changes: object) -> str:
    return json.dumps(manifest | changes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: "", "not a valid manifest"),
        (lambda m: json.dumps(m)[:-10], "not a valid manifest"),
        (lambda m: "[1]", "not a valid manifest"),
        (lambda m: edit(m, format="something else"), "not a valid manifest"),
        (lambda m: edit(m, format_version=99), "format version 99, this code reads"),
        (lambda m: edit(m, num_layers=4), "checksums"),
        (lambda m: edit(m, file_bytes=1), "says 1 bytes"),
        (lambda m: edit(m, checksums=[["xyz"] * 4] * 3), "not valid"),
        (lambda m: edit(m, layout=[]), "not valid"),
        (lambda m: edit(m, layout=[{"name": "t"}]), "not valid"),
        (lambda m: edit(m, surprise=1), "surprise"),
    ],
)
def test_damaged_manifest_does_not_open(tmp_path, damage, message):
    store = build(tmp_path)
    path = store.directory / "manifest.json"
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(DamagedStore, match=message) as caught:
        open_store(store.directory, store.identity)
    assert str(path) in str(caught.value)


def test_a_condemned_store_does_not_open(tmp_path):
    store = build(tmp_path)
    for layer, expert, reason in ((1, 2, "why"), (0, 3, "because")):
        store.condemn(layer, expert, reason)
    with pytest.raises(
        DamagedStore,
        match=rf"{store.directory} holds a damaged record: expert 3 of layer 0: because",
    ):
        open_store(store.directory, store.identity)
    note = store.directory / "condemned.txt"
    assert stat.S_IMODE(note.stat().st_mode) == 0o600
    assert list(tmp_path.rglob("*.txt")) == [note]


def test_that_a_store_is_condemned_is_enough(tmp_path, monkeypatch):
    """Whoever noted it may have been root."""
    store = build(tmp_path)
    store.condemn(0, 1, "why")
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: os.open(tmp_path / "none", 0))
    with pytest.raises(DamagedStore, match="holds a damaged record"):
        open_store(store.directory, store.identity)


def test_a_store_that_cannot_be_condemned_says_so(tmp_path, caplog):
    store = build(tmp_path)
    (store.directory / "condemned.txt").symlink_to(tmp_path / "elsewhere")
    store.condemn(0, 1, "why")
    assert "cannot note" in caplog.text
    assert str(store.directory) in caplog.text
    assert not (tmp_path / "elsewhere").exists()


def test_joined_stores_are_one(tmp_path):
    first = build(tmp_path, num_layers=3)
    second = build(tmp_path, num_layers=2, first_layer=3, stages=(3,))
    assert first.directory != second.directory
    both = joined(first, second)
    assert (both.num_layers, both.num_experts, both.layout) == (5, 4, first.layout)
    assert both.paths == (first.path, second.path)
    assert both.file_bytes == first.file_bytes + second.file_bytes
    assert both.record_offset(3, 1) == first.file_bytes + second.record_offset(0, 1)
    assert both.checksum(4, 2) == second.checksum(1, 2)
    assert both.store_of(2) == (first, 2)
    assert both.store_of(4) == (second, 1)
    with pytest.raises(IndexError, match="holds 5 layers of 4 experts"):
        both.record_offset(5, 0)
    assert joined(first) is first


def test_a_damaged_record_condemns_the_store_that_has_it(tmp_path):
    first = build(tmp_path, num_layers=3)
    second = build(tmp_path, num_layers=2, stages=(3,))
    joined(first, second).condemn(4, 2, "why")
    assert open_store(first.directory, first.identity) is not None
    with pytest.raises(DamagedStore, match="expert 2 of layer 1: why"):
        open_store(second.directory, second.identity)


def test_stores_of_other_experts_are_not_joined(tmp_path):
    first = build(tmp_path)
    others = (
        build(tmp_path, num_experts=5, stages=(3,)),
        build(tmp_path, layout_of(8192), stages=(4,)),
    )
    for other in others:
        with pytest.raises(ValueError, match="experts of different form"):
            joined(first, other)
