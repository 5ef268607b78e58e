"""What a store is of: its key, its directory, the fingerprint of its checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.stores import identity, place
from vllm_moe_offload.rank import Rank
from vllm_moe_offload.store import StoreError, checkpoint_fingerprint


def flip_byte(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (value,) = file.read(1)
        file.seek(offset)
        file.write(bytes([value ^ 1]))


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint": "other"},
        {"load_format": "dummy"},
        {"dtype": "float16"},
        {"quantization": "fp8"},
        {"kernel": "CPUExperts:amx"},
        {"padded_shape": (64, 256)},
        {"rank": Rank(tp_size=2)},
        {"rank": Rank(ep_size=2)},
        {"rank": Rank(pp_size=2)},
        {"stages": (0, 2)},
        {"expert_placement": "round_robin"},
        {"vllm_version": "0.33.0"},
        {"format_version": 1},
    ],
)
def test_every_field_changes_the_key(change):
    assert identity(**change).key != identity().key


def test_ranks_lie_beside_each_other(tmp_path):
    sizes = {"pp_size": 2, "tp_size": 2, "ep_size": 2}
    ranks = [
        Rank(pp=pp, tp=tp, ep=ep, **sizes)
        for pp in range(2)
        for tp in range(2)
        for ep in range(2)
    ]
    places = [place(tmp_path, rank=rank)[0] for rank in ranks]
    assert len(set(places)) == 8
    assert {path.parent for path in places} == {places[0].parent}
    assert places[1].name == "pp0of2-tp0of2-ep1of2"
    assert places[0].parent.name == f"model-{identity(rank=ranks[7]).key[:16]}"


@pytest.mark.parametrize("model", ["../..", "/", "a b/ü!x", "org/Mixtral-8x7B-v0.1", "x" * 300])
def test_any_model_name_gives_one_directory_below_store_dir(tmp_path, model):
    directory = identity().directory(tmp_path, model)
    assert directory.resolve().parent.parent == tmp_path.resolve()


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "mixtral"}')
    for shard in range(2):
        header = json.dumps({"w": {"dtype": "U8", "shape": [9 << 20], "data_offsets": [0, 1]}})
        body = np.random.default_rng(shard).integers(0, 256, 9 << 20, dtype=np.uint8)
        (path / f"model-{shard}.safetensors").write_bytes(
            len(header).to_bytes(8, "little") + header.encode() + body.tobytes()
        )
    return path


def test_copied_checkpoint_keeps_its_fingerprint(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    (copy / "README.md").write_text("not part of the model")
    assert checkpoint_fingerprint(copy) == checkpoint_fingerprint(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: (path / "config.json").write_text('{"model_type": "mixtra1"}'),
        lambda path: flip_byte(path / "model-1.safetensors", 12),  # in the header
        lambda path: flip_byte(path / "model-1.safetensors", (4 << 20) + 100),
        lambda path: flip_byte(path / "model-0.safetensors", (9 << 20) + 20),  # the end
        lambda path: os.truncate(path / "model-0.safetensors", 8 << 20),
        lambda path: (path / "model-0.safetensors").rename(path / "model-2.safetensors"),
        lambda path: (path / "model-0.safetensors").unlink(),
        lambda path: (path / "model-0.safetensors").write_bytes(b""),
    ],
)
def test_changed_checkpoint_gets_another_fingerprint(checkpoint, change):
    before = checkpoint_fingerprint(checkpoint)
    change(checkpoint)
    assert checkpoint_fingerprint(checkpoint) != before


def test_rewritten_weights_of_equal_size_are_noticed(checkpoint):
    before = checkpoint_fingerprint(checkpoint)
    path = checkpoint / "model-0.safetensors"
    content = bytearray(path.read_bytes())
    content[200:] = np.frombuffer(content[200:], np.uint8)[::-1].tobytes()
    path.write_bytes(content)
    assert checkpoint_fingerprint(checkpoint) != before


def test_fingerprint_of_what_is_no_checkpoint(tmp_path):
    with pytest.raises(StoreError, match="not a directory"):
        checkpoint_fingerprint(tmp_path / "org" / "model")
    with pytest.raises(StoreError, match=r"config\.json"):
        checkpoint_fingerprint(tmp_path)


def test_names_of_files_that_are_no_text(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = checkpoint_fingerprint(tmp_path)
    (tmp_path / os.fsdecode(b"model\xff.safetensors")).write_bytes(bytes(100))
    assert checkpoint_fingerprint(tmp_path) != before
