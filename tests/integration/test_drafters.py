"""Checkpoints that also hold a drafter (multi-token prediction): the model without it is served."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.integration.conftest import LAYERS, engine
from tests.integration.test_identity import assert_identical, num_experts, offload
from vllm_moe_offload.cli import main
from vllm_moe_offload.integration.checkpoint import SortedCheckpoint

pytestmark = pytest.mark.vllm
ARCH = "deepseek_v2"


def with_drafters(model: Path, out: Path) -> Path:
    """The model with a layer behind its last, as DeepSeek-V3 and GLM-4.5 have it."""
    shutil.copytree(model, out)
    for path in out.glob("*.safetensors*"):
        path.unlink()
    tensors: dict = {}
    for path in model.glob("*.safetensors"):
        tensors |= load_file(path)
    last = re.compile(rf"^model\.layers\.{LAYERS - 1}\.")
    of_last = {name: tensor for name, tensor in tensors.items() if last.match(name)}
    assert any(".experts." in name for name in of_last)
    for name, tensor in of_last.items():
        tensors[last.sub(f"model.layers.{LAYERS}.", name)] = tensor.clone()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = out / "config.json"
    document = json.loads(config.read_text()) | {"num_nextn_predict_layers": 1}
    config.write_text(json.dumps(document))
    return out


@pytest.fixture(scope="module")
def drafted(demo_model, tmp_path_factory) -> Path:
    return with_drafters(demo_model(ARCH), tmp_path_factory.mktemp("drafted") / "model")


def test_the_model_is_served_without_them(drafted, store_dir, share_engines):
    """Feature: checkpoints with MTP layers, speculation off; first and second start."""
    jobs = [
        engine(drafted, eager=True),
        engine(drafted, eager=True, offload=offload(store_dir, "50%")),
        engine(drafted, eager=True, offload=offload(store_dir, "50%")),
    ]
    half = num_experts(ARCH) // 2
    assert_identical(share_engines(jobs), [half, half])


def test_modules_beside_the_model_are_in_no_layer(tmp_path):
    """Qwen3-Next's ``mtp.layers.0``: not the model's layer 0."""
    names = ("model.layers.0.mlp.experts.0.up_proj.weight", "model.norm.weight")
    drafters = ("mtp.layers.0.mlp.experts.0.up_proj.weight", "mtp.norm.weight")
    tensors = {name: torch.full((2,), float(n)) for n, name in enumerate((*names, *drafters))}
    save_file(tensors, tmp_path / "model.safetensors")
    found = tmp_path, [str(tmp_path / "model.safetensors")], True, None
    loader = SimpleNamespace(
        counter_before_loading_weights=1.0, _prepare_weights=lambda *source: found
    )
    config = SimpleNamespace(model=str(tmp_path), revision=None)
    checkpoint = SortedCheckpoint(loader, config, torch.nn.Module())
    assert checkpoint.expert_layers == [0]
    assert checkpoint.left_out == {"mtp"}
    assert [name for name, _ in checkpoint.dense()] == ["model.norm.weight", "mtp.norm.weight"]
    with checkpoint.experts([0]) as stream:
        assert [name for name, _ in stream.next_group()] == [names[0]]


def test_plan_leaves_them_out_and_says_so(drafted, capsys):
    assert main(["plan", str(drafted), "--host-memory", "8GiB"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"Experts of layer {LAYERS} (multi-token prediction) are left out" in text
    assert f"{num_experts(ARCH)} experts of" in text
