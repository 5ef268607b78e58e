"""The collection of activation matrices."""

from __future__ import annotations

import stat
from pathlib import Path

import msgpack
import numpy as np
import pytest

from tests.trace.mutations import mutated
from vllm_moe_offload.trace.collection import (
    ActivationCollection,
    CollectionError,
)
from vllm_moe_offload.trace.sketches import COARSE_CANDIDATES, EXACT_KEYS


def counts(layers: int = 2, experts: int = 4, **values: int) -> np.ndarray:
    """``counts(e03=2)``: two tokens to expert 3 of layer 0."""
    table = np.zeros((layers, experts), np.float32)
    for key, value in values.items():
        table[int(key[1]), int(key[2])] = value
    return table


def filled(capacity: int = 3) -> ActivationCollection:
    collection = ActivationCollection(2, 4, capacity, "model-a")
    for values in ({"e00": 4, "e10": 4}, {"e01": 2, "e11": 2}, {"e02": 1, "e12": 1}):
        collection.add(counts(**values))
    return collection


def test_it_grows_to_its_capacity_and_no_further() -> None:
    collection = ActivationCollection(2, 4, 2)
    generator = np.random.default_rng(0)
    for expected in (1, 2, 2, 2):
        collection.add(generator.integers(1, 9, (2, 4)))
        assert len(collection) == expected


def test_nearest_by_cosine() -> None:
    collection = filled()
    indices, cosines = collection.nearest(counts(e01=10, e00=1), 2)
    assert indices.tolist() == [1, 0]
    assert cosines == pytest.approx([10 / np.sqrt(202), 1 / np.sqrt(202)], abs=1e-6)


def test_the_size_of_a_request_does_not_matter() -> None:
    assert filled().nearest(counts(e02=50, e12=50))[1] == pytest.approx([1.0])


def test_the_closest_entry_makes_room() -> None:
    collection = filled()
    index = collection.add(counts(e01=5, e11=4))
    assert index == 1
    assert collection.entry(0).counts.tolist() == [4, 4]
    assert collection.entry(1).counts.tolist() == [5, 4]


def test_nothing_matches_nothing() -> None:
    collection = ActivationCollection(2, 4, 3)
    assert collection.nearest(counts(e00=1))[0].size == 0
    assert collection.add(counts()) == -1
    assert filled().nearest(counts())[0].size == 0
    assert filled().nearest_each(np.stack([counts(), counts(e02=1)]))[0].tolist() == [-1, 2]


def test_distribution_and_mean() -> None:
    collection = filled(capacity=2)  # the third replaced one of the first two
    distribution = collection.distribution(0)
    assert distribution.sum(axis=1) == pytest.approx([1, 1])
    expected = (collection.distribution(0) + collection.distribution(1)) / 2
    np.testing.assert_allclose(collection.mean(), expected, atol=1e-6)


@pytest.mark.parametrize("entries", [50, 2 * COARSE_CANDIDATES])
def test_sketches_find_what_an_exact_search_finds(entries: int) -> None:
    layers, experts = 4, EXACT_KEYS
    generator = np.random.default_rng(1)
    collection = ActivationCollection(layers, experts, entries)
    kinds = generator.choice(experts, (10, layers, 40))
    tables = []
    for index in range(entries):
        table = np.zeros((layers, experts), np.float32)
        for layer in range(layers):
            chosen = generator.choice(kinds[index % 10, layer], 60)
            np.add.at(table[layer], chosen, 1)
        tables.append(table)
        collection.add(table)
    stacked = np.stack(tables).reshape(entries, -1)
    stacked /= np.linalg.norm(stacked, axis=1, keepdims=True)
    for index in range(50):
        noisy = tables[index].copy()
        noisy[2:] = 0
        similarity = stacked @ noisy.reshape(-1) / np.linalg.norm(noisy)
        found, cosines = collection.nearest(noisy, 1)
        assert cosines[0] == pytest.approx(similarity[found[0]], abs=1e-5)
        assert cosines[0] >= similarity.max() - 0.02


def test_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "eam.msgpack"
    collection = filled()
    collection.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["eam.msgpack"]
    loaded = ActivationCollection.load(path, fingerprint="model-a")
    assert len(loaded) == 3
    for index in range(3):
        np.testing.assert_array_equal(loaded.entry(index).keys, collection.entry(index).keys)
        np.testing.assert_array_equal(
            loaded.entry(index).counts, collection.entry(index).counts
        )
    np.testing.assert_allclose(loaded.mean(), collection.mean(), atol=1e-6)
    assert len(ActivationCollection.load(path, capacity=2)) == 2


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "eam.msgpack"
    filled().save(path)
    before = path.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vllm_moe_offload.files.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        ActivationCollection(2, 4, 2).save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def document(**changes: object) -> bytes:
    collection = filled()
    data = {
        "format": "vllm-moe-offload EAM collection",
        "version": 1,
        "fingerprint": "model-a",
        "num_layers": 2,
        "num_experts": 4,
        "entries": [
            [collection.entry(0).keys.tobytes(), collection.entry(0).counts.tobytes()],
        ],
    }
    return msgpack.packb(data | changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or no collection"),
        (b"\xc1garbage", "damaged or no collection"),
        (document()[:-3], "damaged or no collection"),
        (msgpack.packb([1, 2]), "not an EAM collection"),
        (msgpack.packb({"format": "other"}), "not an EAM collection"),
        (document(version=9), "version 9, this release reads 1"),
        (document(fingerprint="model-b"), "belongs to model 'model-b', this is 'model-a'"),
        (document(entries=[[b"123", b"1234"]]), "is damaged"),
        (document(entries=[[b"\x63\0\0\0", b"\0\0\x80\x3f"]]), r"ascend within \[0, 8\)"),
        (document(entries=[[b"\x01\0\0\0", b"\0\0\xc0\x7f"]]), "numbers of tokens"),
        (document(entries=[[b"\x01\0\0\0", b"\1\0\0\0"]]), "numbers of tokens"),
        (document(entries=[[b"", b""]]), "is damaged"),
        (document(entries=[7]), "two byte strings"),
        (document(entries=[["\1\0\0\0", 1.5]]), "two byte strings"),
        (document(entries={"a": 1}), "entries must be a list"),
        (document(entries=[None] * 20_001), "damaged or no collection"),
        (document(num_layers="two"), "is damaged"),
        (document(num_layers=float("inf")), "must be integers"),
        (document(num_layers=2**31), "not 2147483648 layers of 4"),
        (document(num_layers=0), "not 0 layers of 4"),
        (document(num_experts=2**16 + 1), r"must lie in \[1, 65536\], is 65537"),
        (document(fingerprint="model-a", num_experts=-1), r"must lie in \[1, 65536\], is -1"),
    ],
)
def test_foreign_and_damaged_files_are_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "eam.msgpack"
    path.write_bytes(content)
    with pytest.raises(CollectionError, match=message) as error:
        ActivationCollection.load(path, fingerprint="model-a")
    assert str(path) in str(error.value)
    assert "delete it or set another trace_path" in str(error.value)


def test_a_collection_of_another_shape_is_refused_whatever_its_fingerprint(
    tmp_path: Path,
) -> None:
    path = tmp_path / "eam.msgpack"
    filled().save(path)
    assert len(ActivationCollection.load(path, fingerprint="model-a", shape=(2, 4))) == 3
    with pytest.raises(
        CollectionError, match="is of 2 layers x 4 experts, this model has 4 x 2"
    ):
        ActivationCollection.load(path, fingerprint="model-a", shape=(4, 2))


def test_a_file_too_large_for_a_collection_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "eam.msgpack"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # takes no room: all of it is a hole
    with pytest.raises(CollectionError, match="has 1099511627776 bytes"):
        ActivationCollection.load(path)


def test_lists_in_lists_take_no_memory(tmp_path: Path) -> None:
    """Each level may say that it is long: of this file 500 lists of its length would be made."""
    path = tmp_path / "eam.msgpack"
    length = 8 << 20
    path.write_bytes((b"\xdd" + length.to_bytes(4, "big")) * 500 + bytes(length))
    with pytest.raises(CollectionError, match="damaged or no collection"):
        ActivationCollection.load(path)


@pytest.mark.parametrize("seed", range(4))
def test_no_change_of_bytes_gives_another_error(tmp_path: Path, seed: int) -> None:
    """Bits, bytes and pieces changed, 500 times each: read, or refused by name."""
    path = tmp_path / "eam.msgpack"
    whole = document(
        entries=[[e.keys.tobytes(), e.counts.tobytes()] for e in map(filled().entry, range(3))]
    )
    generator = np.random.default_rng(seed)
    refused = 0
    for _ in range(500):
        path.write_bytes(mutated(whole, generator))
        try:
            loaded = ActivationCollection.load(path, capacity=10)
        except CollectionError:
            refused += 1
        else:
            assert np.isfinite(loaded.mean()).all()
            assert np.isfinite(loaded.nearest(np.ones(loaded.mean().shape), 3)[1]).all()
    assert refused > 100


VALUES = (
    None,
    -1,
    0,
    2**31,
    2**63,
    0.5,
    float("inf"),
    float("nan"),
    "a",
    b"a" * 8,
    [],
    {},
)


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize(
    "key", ["format", "version", "fingerprint", "num_layers", "num_experts"]
)
def test_no_value_gives_another_error(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "eam.msgpack"
    path.write_bytes(document(**{key: value}))
    if (key, value) == ("fingerprint", "a"):
        assert ActivationCollection.load(path).fingerprint == "a"
        return
    with pytest.raises(CollectionError, match=r"eam\.msgpack"):
        ActivationCollection.load(path)


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize("depth", range(3))
def test_no_entry_gives_another_error(tmp_path: Path, depth: int, value: object) -> None:
    """In the place of all entries, of one, and of its counts."""
    path = tmp_path / "eam.msgpack"
    entry = [b"\0\0\0\0", b"\0\0\x80\x3f"]
    entries = (value, [entry, value], [entry, [entry[0], value]])[depth]
    path.write_bytes(document(entries=entries))
    if (depth, value) == (0, []):
        assert len(ActivationCollection.load(path)) == 0
        return
    with pytest.raises(CollectionError, match=r"eam\.msgpack"):
        ActivationCollection.load(path)


def test_capacity_is_checked() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ActivationCollection(2, 4, 0)
