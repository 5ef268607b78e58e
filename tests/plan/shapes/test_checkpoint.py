"""Exact sizes of local checkpoints, from file headers alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts.demo_model import ARCHS, write_demo_model
from scripts.quantize import quantize
from vllm_moe_offload.plan.shapes import ExpertFormat, ShapeError, shape_of_config
from vllm_moe_offload.plan.shapes.checkpoint import read_checkpoint
from vllm_moe_offload.plan.shapes.kernel_form import BF16

SIZES = {"layers": 3, "experts": 4, "top_k": 2, "hidden": 64, "intermediate": 32}


@pytest.fixture(scope="module")
def demo_models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for arch in ARCHS:
        write_demo_model(folder / arch, arch, **SIZES, max_shard_bytes=100_000)
    return {arch: folder / arch for arch in ARCHS}


@pytest.fixture
def mixtral(demo_models, tmp_path) -> Path:
    """One of them, to be changed."""
    return Path(shutil.copytree(demo_models["mixtral"], tmp_path / "model"))


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in directory.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def rewrite(directory: Path, **changes: torch.Tensor | None) -> None:
    """Replaces (or with None removes) tensors, in one file without an index."""
    tensors = tensors_of(directory) | changes
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        directory / "model.safetensors",
    )


@pytest.mark.parametrize("arch", ARCHS)
def test_files_and_config_agree(demo_models, arch):
    """Both ways to count, on checkpoints that vLLM loads, find the same parameters."""
    found = read_checkpoint(demo_models[arch])
    assert found.is_counted
    tensors = tensors_of(demo_models[arch])
    assert found.shape.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert found.file_bytes == sum(tensor.nbytes for tensor in tensors.values())
    config = json.loads((demo_models[arch] / "config.json").read_text())
    assert found.shape == shape_of_config(config, "config.json")


def test_files_win_over_the_config(mixtral):
    rewrite(mixtral, **{"extra.weight": torch.zeros(7, 3, dtype=torch.bfloat16)})
    config = json.loads((mixtral / "config.json").read_text())
    counted = read_checkpoint(mixtral).shape.dense_parameters
    assert counted == shape_of_config(config, "c").dense_parameters + 21


def test_without_weights_the_config_is_all_there_is(mixtral):
    before = read_checkpoint(mixtral)
    for path in mixtral.glob("*.safetensors*"):
        path.unlink()
    after = read_checkpoint(mixtral)
    assert (after.is_counted, after.file_bytes) == (False, 0)
    assert after.shape == before.shape


def test_layers_behind_the_last_are_told_apart(mixtral):
    """Multi-token prediction: neither served, nor counted."""
    before = read_checkpoint(mixtral).shape
    weight = torch.zeros(8, 8, dtype=torch.bfloat16)
    rewrite(
        mixtral,
        **{
            "model.layers.3.block_sparse_moe.experts.0.w1.weight": weight,
            "model.layers.3.self_attn.q_proj.weight": weight.clone(),
            "mtp.layers.0.mlp.experts.0.up_proj.weight": weight.clone(),
        },
    )
    after = read_checkpoint(mixtral).shape
    assert after.extra_expert_layers == (3,)
    assert after.parameters == before.parameters


def test_packed_experts_are_quantised_whatever_the_config_says(mixtral):
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    rewrite(mixtral, **{name: torch.zeros(32, 32, dtype=torch.uint8)})
    found = read_checkpoint(mixtral)
    assert not found.is_counted
    assert found.shape.format is None
    assert found.shape.refusal == "tensors of BF16, U8, without a quantization_config"


@pytest.mark.parametrize("format", ["int8", "int4", "gptq", "awq", "fp8"])
def test_quantised_files_are_counted(format, tmp_path):
    """Dense weights are what the files hold, packed or not; parameters are the config's."""
    sizes = {**SIZES, "hidden": 512, "intermediate": 256}
    write_demo_model(tmp_path / "plain", "qwen3_moe", **sizes)
    for experts_only in (True, False):
        quantize(
            tmp_path / "plain", tmp_path / "q", format, experts_only=experts_only, force=True
        )
        found = read_checkpoint(tmp_path / "q")
        assert found.is_counted
        config = json.loads((tmp_path / "q" / "config.json").read_text())
        estimated = shape_of_config(config, "c")
        assert found.shape.format == estimated.format != BF16
        dense = [t for name, t in tensors_of(tmp_path / "q").items() if ".experts." not in name]
        assert found.shape.dense_bytes == sum(tensor.nbytes for tensor in dense)
        assert found.shape.dense_parameters == estimated.dense_parameters
        # What is estimated without files is near, and no estimate for what stays as it was.
        assert estimated.dense_bytes == pytest.approx(found.shape.dense_bytes, rel=0.05)
        if experts_only:
            assert estimated.dense_bytes == found.shape.dense_bytes


def test_mxfp4_files_are_counted(tmp_path):
    write_demo_model(tmp_path / "plain", "gpt_oss", **SIZES)
    quantize(tmp_path / "plain", tmp_path / "q", "mxfp4")
    found, plain = read_checkpoint(tmp_path / "q"), read_checkpoint(tmp_path / "plain")
    assert found.is_counted
    assert found.shape.format == ExpertFormat("mxfp4")
    assert found.shape.dense_bytes == plain.shape.dense_bytes
    assert found.shape.parameters == plain.shape.parameters


def test_a_config_that_says_quantised_of_files_that_are_not(mixtral):
    path = mixtral / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    path.write_text(json.dumps(config))
    with pytest.raises(ShapeError, match=r"config.json experts are quantised, .* of BF16"):
        read_checkpoint(mixtral)


def test_contradictions_are_errors(mixtral):
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    rewrite(mixtral, **{name: torch.zeros(33, 64, dtype=torch.bfloat16)})
    with pytest.raises(ShapeError, match="4 experts of 6,144 parameters are 24,576 elements"):
        read_checkpoint(mixtral)
    missing = {key: None for key in tensors_of(mixtral) if ".layers.1." in key}
    rewrite(mixtral, **missing)
    with pytest.raises(ShapeError, match=r"by config.json layers 0 to 2 .* layers 0, 2"):
        read_checkpoint(mixtral)


def test_incomplete_and_damaged_checkpoints(mixtral, tmp_path):
    with pytest.raises(ShapeError, match=r"no checkpoint: it has no config.json"):
        read_checkpoint(tmp_path)
    directory = mixtral
    shards = sorted(directory.glob("*.safetensors"))
    assert len(shards) > 1
    content = shards[0].read_bytes()
    shards[0].unlink()
    with pytest.raises(ShapeError, match=f"incomplete: 1 of {len(shards)} files"):
        read_checkpoint(directory)
    shards[0].write_bytes(content[:-10])
    with pytest.raises(ValueError, match="or damaged"):
        read_checkpoint(directory)
    (directory / "config.json").write_text("[]")
    with pytest.raises(ShapeError, match="holds no JSON object"):
        read_checkpoint(directory)
    for text in (b"{", b'{"a":' + b"[" * 100_000, b"\xff\xfe", b"1" * 5000):
        (directory / "config.json").write_bytes(text)
        with pytest.raises(ShapeError, match="is not JSON"):
            read_checkpoint(directory)
    with (directory / "config.json").open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(ShapeError, match="1099511627776 bytes, 67108864 at most are read"):
        read_checkpoint(directory)
