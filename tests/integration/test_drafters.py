"""Checkpoints that also hold a drafter (multi-token prediction): the model without it is served."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from scripts.demo_model.mtp import DENSE_LAYERS, MTP_ARCHS
from tests.integration.conftest import EXPERTS, LAYERS, engine
from tests.integration.test_identity import assert_identical, offload
from vllm_moe_offload.cli import main
from vllm_moe_offload.integration.checkpoint import SortedCheckpoint

pytestmark = pytest.mark.vllm
NUM_EXPERTS = EXPERTS * (LAYERS - DENSE_LAYERS)
"""Routed experts of the models without their drafters."""


@pytest.mark.parametrize("arch", MTP_ARCHS)
def test_the_model_is_served_without_them(arch, mtp_model, store_dir, share_engines):
    """Feature: checkpoints with MTP layers, speculation off; first and second start."""
    model = mtp_model(arch)
    jobs = [
        engine(model, eager=True),
        engine(model, eager=True, offload=offload(store_dir, "50%")),
        engine(model, eager=True, offload=offload(store_dir, "50%")),
    ]
    assert_identical(share_engines(jobs), [NUM_EXPERTS // 2, NUM_EXPERTS // 2])


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
    of_drafter = SortedCheckpoint(loader, config, torch.nn.Module(), names_drafters=True)
    with of_drafter.experts(of_drafter.expert_layers) as stream:
        assert [name for name, _ in stream.next_group()] == [drafters[0]]


@pytest.mark.parametrize("arch", MTP_ARCHS)
def test_plan_leaves_them_out_and_says_so(arch, mtp_model, capsys):
    assert main(["plan", str(mtp_model(arch)), "--host-memory", "8GiB"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"Experts of layer {LAYERS} (multi-token prediction) are left out" in text
    assert f"{NUM_EXPERTS} experts of" in text
