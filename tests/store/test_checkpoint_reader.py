"""Reading a checkpoint's tensors ahead: the same bytes as safetensors reads, in order."""

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vllm_moe_offload.store import checkpoint_reader
from vllm_moe_offload.store.checkpoint_header import tensor_ranges
from vllm_moe_offload.store.checkpoint_reader import (
    DTYPES,
    TensorStream,
    expert_layer,
    expert_number,
)


def write_file(path, sizes, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(len(sizes))
    tensors = {
        f"t{index:03d}": torch.randn(size, 3, generator=generator).to(dtype)
        for index, size in enumerate(sizes)
    }
    save_file(tensors, str(path), metadata={"format": "pt"})
    return tensors


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=12),
    dtype=st.sampled_from(sorted(DTYPES)),
    groups=st.integers(1, 4),
    limits=st.tuples(
        st.sampled_from([1, 5000, 1 << 20]), st.sampled_from([1, 20_000, 1 << 20])
    ),
)
def test_every_tensor_as_safetensors_reads_it(tmp_path, sizes, dtype, groups, limits):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_reader, "EXTENT_BYTES", limits[0])
        patch.setattr(checkpoint_reader, "WINDOW_BYTES", limits[1])
        check_against_safetensors(tmp_path, sizes, dtype, groups)


def check_against_safetensors(tmp_path, sizes, dtype, groups):
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for path in paths:
        write_file(path, sizes, DTYPES[dtype])
    expected = {f"{path.stem}.{n}": t for path in paths for n, t in load_file(path).items()}
    entries = [
        (f"{path.stem}.{name}", where)
        for path in paths
        for name, where in tensor_ranges(path).items()
    ]
    parts = [entries[number::groups] for number in range(groups)]
    found = {}
    with TensorStream(parts) as stream:
        for part in parts:
            group = dict(stream.next_group())
            assert group.keys() == {name for name, _ in part}
            found |= group
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_tensors_outlive_the_stream(tmp_path):
    tensors = write_file(tmp_path / "a.safetensors", [1000] * 20)
    with TensorStream([list(tensor_ranges(tmp_path / "a.safetensors").items())]) as stream:
        found = dict(stream.next_group())
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_left_early_nothing_stays_open(tmp_path):
    write_file(tmp_path / "a.safetensors", [1000] * 20)
    entries = list(tensor_ranges(tmp_path / "a.safetensors").items())
    with TensorStream([entries, entries]) as stream:
        next(stream.next_group())
    assert not stream._descriptors


def test_reads_stay_within_the_window(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_reader, "EXTENT_BYTES", 8192)
    monkeypatch.setattr(checkpoint_reader, "WINDOW_BYTES", 40_000)
    write_file(tmp_path / "a.safetensors", [1000] * 30)
    with TensorStream([list(tensor_ranges(tmp_path / "a.safetensors").items())]) as stream:
        most = 0
        for _ in stream.next_group():
            most = max(most, stream._ahead_bytes)
        assert 8192 < most <= 40_000


def test_a_file_that_shrinks_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    write_file(path, [1000] * 4)
    ranges = list(tensor_ranges(path).items())
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)
    with (
        TensorStream([ranges]) as stream,
        pytest.raises(OSError, match=r"a\.safetensors ended at byte \d+, \d+ are needed"),
    ):
        list(stream.next_group())


def test_numbers_in_names():
    name = "model.layers.{}.mlp.experts.{}.up_proj.weight"
    assert (expert_layer(name.format(3, 17)), expert_number(name.format(3, 17))) == (3, 17)
    endless = name.format("9" * 5000, "9" * 5000)  # more digits than int() takes
    assert (expert_layer(endless), expert_number(endless)) == (None, None)


@pytest.mark.parametrize("shift", range(4))
def test_tensors_at_any_offset(tmp_path, shift):
    values = torch.arange(5, dtype=torch.float32)
    path = tmp_path / "a.safetensors"
    text = json.dumps({"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}}).encode()
    text += b" " * (-len(text) % 4 + shift)
    path.write_bytes(struct.pack("<Q", len(text)) + text + values.numpy().tobytes())
    with TensorStream([list(tensor_ranges(path).items())]) as stream:
        ((_, found),) = stream.next_group()
    assert torch.equal(found, values)
