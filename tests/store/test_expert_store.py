"""Opening a store: what was built opens, and nothing else does."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import stat
from pathlib import Path

import pytest

from tests.mutations import mutations
from tests.stores import MIXED, build, layout_of, place
from vllm_moe_offload.store import (
    DamagedStore,
    ExpertStore,
    StoreError,
    joined,
    open_store,
)


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


def edit_tensor(manifest: dict, **changes: object) -> str:
    first, *others = manifest["layout"]
    return edit(manifest, layout=[first | changes, *others])


def edit_rank(manifest: dict, **changes: object) -> str:
    identity = manifest["identity"]
    return edit(manifest, identity=identity | {"rank": identity["rank"] | changes})


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
        (lambda m: edit(m, checksums=[["xyz"] * 4] * 3), "not a valid manifest"),
        (lambda m: edit(m, checksums=[["0"] * 4] * 3), "not a valid manifest"),
        (lambda m: edit(m, layout=[]), "is not valid"),
        (lambda m: edit(m, layout=[{"name": "t"}]), "not a valid manifest"),
        (lambda m: edit(m, layout=[m["layout"][0]] * 2), "is not valid"),
        (lambda m: edit(m, surprise=1), "surprise"),
        # No kind is taken for another, and nothing is allocated by what a file says.
        (lambda m: edit(m, num_layers=1 << 32), "checksums of 4294967296 x 4 records"),
        (lambda m: edit(m, num_experts=1 << 62), "checksums"),
        (lambda m: edit(m, num_layers=-3), "num_layers"),
        (lambda m: edit(m, num_layers=3.0), "num_layers"),
        (lambda m: edit(m, num_layers="3"), "num_layers"),
        (lambda m: edit(m, file_bytes=True), "file_bytes"),
        (lambda m: re.sub('"file_bytes": [0-9]+', '"file_bytes": 1e999', edit(m)), "file_byte"),
        (lambda m: edit_tensor(m, shape=["1e999"]).replace('"1e999"', "1e999"), "shape"),
        (lambda m: edit_tensor(m, shape=[8192.0]), "shape"),
        (lambda m: edit_tensor(m, shape=[8191]), "nbytes=8192, but"),
        (lambda m: edit_tensor(m, dtype="bfloat17"), "dtype="),
        (lambda m: edit_tensor(m, nbytes="8192"), "nbytes"),
        (lambda m: edit_tensor(m, name="a\nb\0"), "name="),
        (lambda m: edit(m, identity=m["identity"] | {"stages": []}), "stages"),
        (lambda m: edit_rank(m, pp_size=0), "pp_size"),
        (lambda m: edit_rank(m, pp=-1), "rank.pp"),
        (lambda m: edit(m, surprise=0)[:-2] + "[" * 100_000, "not a valid manifest"),
        (lambda m: edit(m) + "\0", "not a valid manifest"),
        (lambda m: edit(m, **{"a\nb\x1b[2J": 1}), r"a\\nb\\x1b"),
    ],
)
def test_damaged_manifest_does_not_open(tmp_path, damage, message):
    store = build(tmp_path)
    path = store.directory / "manifest.json"
    path.write_text(damage(json.loads(path.read_text())))
    refusal = refused(store)
    assert re.search(message, refusal), refusal
    assert str(path) in refusal


def refused(store: ExpertStore) -> str:
    """What an error of opening says, to a start and to `store list`."""
    said = []
    for identity in (store.identity, None):
        with pytest.raises(DamagedStore) as caught:
            open_store(store.directory, identity)
        said.append(str(caught.value))
        assert said[-1].isprintable()
        assert len(said[-1]) < 5000
    return said[0]


def test_a_manifest_that_is_too_long_is_not_read(tmp_path):
    store = build(tmp_path)
    os.truncate(store.directory / "manifest.json", 1 << 40)  # sparse
    assert "1099511627776 bytes, 67108864 at most are read" in refused(store)


def test_any_manifest_opens_or_is_damaged(tmp_path):
    """What opens was not changed in what decides where records lie and what is in them."""
    store = build(tmp_path)
    path = store.directory / "manifest.json"
    for document in mutations(json.loads(path.read_text())):
        path.write_text(json.dumps(document))
        with contextlib.suppress(DamagedStore):
            opened = open_store(store.directory, None)
            assert opened.file_bytes == store.file_bytes
            assert opened.layout.record_bytes == store.layout.record_bytes


@pytest.mark.parametrize("seed", range(300))
def test_a_manifest_with_other_bytes_opens_or_is_damaged(damaged_bytes, seed):
    store, sound = damaged_bytes
    random_ = random.Random(seed)
    content = bytearray(sound)
    for _ in range(random_.randint(1, 4)):
        content[random_.randrange(len(content))] = random_.randrange(256)
    (store.directory / "manifest.json").write_bytes(content)
    with contextlib.suppress(DamagedStore):
        assert open_store(store.directory, None).file_bytes == store.file_bytes


@pytest.fixture(scope="module")
def damaged_bytes(tmp_path_factory) -> tuple[ExpertStore, bytes]:
    """A store whose manifest each test writes anew, and what it was."""
    store = build(tmp_path_factory.mktemp("stores"))
    return store, (store.directory / "manifest.json").read_bytes()


# ---- what the identity does not say ----------------------------------------------------------


def test_a_store_of_another_number_of_layers_or_experts_does_not_open(tmp_path):
    """With --hf-overrides it has the same checkpoint, and so the same place."""
    store = build(tmp_path)
    wanted = {"num_layers": 3, "num_experts": 4}
    assert open_store(store.directory, store.identity, **wanted) == store
    for name, words in (("num_layers", "3 layers"), ("num_experts", "4 experts per layer")):
        with pytest.raises(DamagedStore, match=f"is of a model with {words}, not 8"):
            open_store(store.directory, store.identity, **wanted | {name: 8})


# ---- what lies in its place ------------------------------------------------------------------


def put_there(kind: str, path: Path, tmp_path: Path) -> None:
    """Something else under a name."""
    if path.exists():
        path.rename(tmp_path / "moved")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / kind)


@pytest.mark.parametrize("kind", ["pipe", "directory", "moved", "nothing"])
@pytest.mark.parametrize("name", ["manifest.json", "experts.bin"])
def test_what_is_no_file_is_neither_read_nor_followed(tmp_path, name, kind):
    store = build(tmp_path / "stores")
    put_there(kind, store.directory / name, tmp_path)
    assert f"{name} is not a regular file; links are not followed" in refused(store)


@pytest.mark.parametrize("kind", ["pipe", "moved", "nothing"])
def test_a_part_is_a_directory(tmp_path, kind):
    store = build(tmp_path / "stores")
    put_there(kind, store.directory, tmp_path)
    assert "is not a directory; links are not followed" in refused(store)


@pytest.mark.parametrize("kind", ["pipe", "directory", "secret", "nothing"])
def test_what_condemns_a_store_is_neither_waited_for_nor_followed(tmp_path, kind):
    (tmp_path / "secret").write_text("of root\n")
    store = build(tmp_path / "stores")
    put_there(kind, store.directory / "condemned.txt", tmp_path)
    refusal = refused(store)
    assert "holds a damaged record" in refusal
    assert "of root" not in refusal


def test_a_line_of_what_condemns_a_store_is_told(tmp_path):
    store = build(tmp_path)
    note = store.directory / "condemned.txt"
    note.write_bytes(b"why \x1b[2J\xff\nsecond line\n")
    assert refused(store).endswith("holds a damaged record: why \\x1b[2J\ufffd")
    os.truncate(note, 1 << 40)  # sparse
    assert "4096 at most are read" in refused(store)


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_nothing_is_written_into_what_is_not_our_own_note(tmp_path, caplog, kind):
    (tmp_path / "precious").write_text("precious")
    store = build(tmp_path / "stores")
    note = store.directory / "condemned.txt"
    if kind == "pipe":
        os.mkfifo(note)
    else:
        note.hardlink_to(tmp_path / "precious")
    store.condemn(0, 1, "why")
    assert "cannot note" in caplog.text
    assert (tmp_path / "precious").read_text() == "precious"


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
    opened = os.open

    def refuse(path: Path, *arguments: int) -> int:
        if Path(path).name == "condemned.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments)

    monkeypatch.setattr(os, "open", refuse)
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
