"""Headers of safetensors files: what is one is read, and everything else is refused in a line."""

from __future__ import annotations

import json
import math
import os
import random
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from tests.mutations import mutated
from vllm_moe_offload.store.checkpoint_header import tensor_ranges

SOUND = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "U8", "shape": [], "data_offsets": [32, 33]},
}
DATA = bytes(range(33))


def write(path: Path, header: object, data: bytes = DATA) -> Path:
    """``header``: an object, or JSON text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def with_a(**changes: object) -> dict[str, object]:
    """The sound header with another first tensor."""
    return SOUND | {"a": SOUND["a"] | changes}


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match="is no safetensors file, or damaged: ") as error:
        tensor_ranges(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_ranges_are_those_that_safetensors_reads(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"x": torch.arange(6.0).view(2, 3), "y": torch.arange(5, dtype=torch.int8)}
    save_file(tensors, str(path), metadata={"format": "pt"})
    content = path.read_bytes()
    ranges = tensor_ranges(path)
    assert ranges.keys() == tensors.keys()
    for name, where in ranges.items():
        assert where.path == path
        assert where.shape == tuple(tensors[name].shape)
        found = content[where.offset : where.offset + where.nbytes]
        assert found == tensors[name].numpy().tobytes()


ANY_JSON = b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24],"more":%s}}'


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"[]", b""),
        (b"{x}", b""),
        (b'{"a":' + b"[" * 100_000, b""),
        (b'{"\xff":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"),
        (b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,24]}}', DATA[:24]),
        (b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,1e999]}}', DATA[:24]),
        (b'{"a":["F32",[2,3],[0,24]]}', DATA[:24]),  # which safetensors takes
        (ANY_JSON % (b"[" * 100_000 + b"]" * 100_000), DATA[:24]),  # the same
        (ANY_JSON % (b"1" * 5000), DATA[:24]),  # the same
        ({"a": {"dtype": "F32", "shape": [1]}}, DATA[:4]),
        ({"a": 1}, b""),
        (SOUND, DATA[:-1]),
        (SOUND, DATA + b"0"),
        (with_a(dtype="F33"), DATA),
        (with_a(dtype=32), DATA),
        (with_a(shape=[2, 4]), DATA),
        (with_a(shape=[-2, -3]), DATA),
        (with_a(shape=[2.0, 3]), DATA),
        (with_a(shape=[True, 6]), DATA),
        (with_a(shape=[2**64, 3]), DATA),
        (with_a(shape="23"), DATA),
        (with_a(data_offsets=[-24, 0]), DATA),
        (with_a(data_offsets=[9, 33]), DATA),
        (with_a(data_offsets=[24, 0]), DATA),
        (with_a(data_offsets=[0, 24, 33]), DATA),
        (SOUND | {"d": SOUND["a"]}, DATA),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path, header, data):
    refusal(write(tmp_path / "x.safetensors", header, data))


@pytest.mark.parametrize("content", [b"", b"\5\0\0", struct.pack("<Q", 1 << 40) + b"{}"])
def test_a_file_that_ends_within_its_header_is_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    refusal(path)


def test_a_header_that_is_too_long_is_not_read(tmp_path):
    """A sparse file, whose header would take 200 GB of memory."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 200 * 10**9))
    os.truncate(path, 201 * 10**9)
    assert "too large" in refusal(path)


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    assert "not a regular file" in refusal(tmp_path / "x.safetensors")
    with pytest.raises(OSError):
        tensor_ranges(tmp_path / "nothing.safetensors")


# ---- anything -------------------------------------------------------------------------------


def flipped(content: bytes, random_: random.Random) -> bytes:
    """A few bytes changed, or the end cut off."""
    damaged = bytearray(content)
    for _ in range(random_.randint(1, 4)):
        damaged[random_.randrange(len(damaged))] = random_.randrange(256)
    return bytes(damaged[: random_.choice([len(damaged), random_.randrange(len(damaged))])])


@settings(
    max_examples=1500,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(random_=st.randoms(use_true_random=False), in_bytes=st.booleans())
def test_any_header_is_read_as_safetensors_does_or_refused(tmp_path, random_, in_bytes):
    path = write(tmp_path / "x.safetensors", SOUND if in_bytes else mutated(SOUND, random_))
    if in_bytes:
        path.write_bytes(flipped(path.read_bytes(), random_))
    try:
        ranges = tensor_ranges(path)
    except ValueError:
        refusal(path)
        return
    with safe_open(path, framework="np") as file:
        assert set(file.keys()) == ranges.keys()
        size = path.stat().st_size
        for name, where in ranges.items():
            part = file.get_slice(name)
            assert (where.dtype, where.shape) == (part.get_dtype(), tuple(part.get_shape()))
            assert 0 <= where.offset <= where.offset + where.nbytes <= size
            assert where.nbytes >= math.prod(where.shape) // 2  # of 4 bits at least
