"""Every tensor is there, of its own, and loads with transformers."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest
import torch

from scripts.demo_model import ARCHS, DemoModelError, write_demo_model
from tests.scripts.demo_model.checkpoints import TINY, digests, experts_of, tensors_of


@pytest.mark.parametrize("arch", ARCHS)
def test_index_names_every_tensor(tiny: dict[str, Path], arch: str) -> None:
    tensors = tensors_of(tiny[arch])
    index = json.loads((tiny[arch] / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert all(t.isfinite().all() for t in tensors.values())


@pytest.mark.parametrize("arch", ARCHS)
def test_transformers_loads_it_completely(tiny: dict[str, Path], arch: str) -> None:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        tiny[arch], dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values()), info
    assert model.config.model_type == arch
    logits = model(torch.arange(20).unsqueeze(0)).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize("arch", ARCHS)
def test_every_expert_tensor_differs(tiny: dict[str, Path], arch: str) -> None:
    groups = experts_of(tensors_of(tiny[arch]))
    kinds = {name.rsplit(".", 2 if name.endswith("weight") else 1)[-1] for name in groups}
    moe_layers = TINY["layers"] - ARCHS[arch].dense_layers
    assert len(groups) == moe_layers * (4 if arch == "gpt_oss" else 3), kinds
    for name, experts in groups.items():
        assert len(experts) == TINY["experts"], name
        for one, other in combinations(experts, 2):
            # Not merely unequal: hardly any element may agree.
            assert (one == other).float().mean() < 0.1, name
    flat = [expert for experts in groups.values() for expert in experts]
    assert all(expert.float().std() > 0 for expert in flat)


@pytest.mark.parametrize("arch", ARCHS)
def test_layers_have_routers_of_their_own(arch: str, tmp_path: Path) -> None:
    write_demo_model(tmp_path, arch, **TINY | {"layers": 3})
    routers = [
        tensor
        for name, tensor in tensors_of(tmp_path).items()
        if name.endswith((".gate.weight", ".router.weight"))
    ]
    assert len(routers) == 3 - ARCHS[arch].dense_layers
    assert not torch.equal(routers[0], routers[1])


def test_experts_cut_from_one_block_of_noise_differ(tmp_path: Path) -> None:
    for name in ("one", "other"):
        write_demo_model(tmp_path / name, "mixtral", **TINY, shared_noise=True)
    assert digests(tmp_path / "one") == digests(tmp_path / "other")
    plain = tmp_path / "plain"
    write_demo_model(plain, "mixtral", **TINY)
    own, cut = tensors_of(plain), tensors_of(tmp_path / "one")
    assert own.keys() == cut.keys()
    for name, tensor in cut.items():
        if ".experts." in name:
            ratio = float(tensor.float().std() / own[name].float().std())
            assert ratio == pytest.approx(1.0, abs=0.1), name
        else:
            assert torch.equal(tensor, own[name]), name
    for tensors in experts_of(cut).values():
        assert all(not torch.equal(one, other) for one, other in combinations(tensors, 2))


def test_longer_positions_only_where_they_rotate_plainly(tmp_path: Path) -> None:
    write_demo_model(tmp_path / "long", "qwen3_moe", **TINY, max_positions=40960)
    config = json.loads((tmp_path / "long" / "config.json").read_text())
    assert config["max_position_embeddings"] == 40960
    with pytest.raises(DemoModelError, match="max_positions is 40960"):
        write_demo_model(tmp_path / "no", "gpt_oss", **TINY, max_positions=40960)


def test_fused_experts_have_noise_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(DemoModelError, match="shared_noise"):
        write_demo_model(tmp_path / "no", "gpt_oss", **TINY, shared_noise=True)


def test_other_seed_other_weights(tiny: dict[str, Path], tmp_path: Path) -> None:
    write_demo_model(tmp_path, "gpt_oss", seed=1, **TINY)
    mine, theirs = tensors_of(tmp_path), tensors_of(tiny["gpt_oss"])
    constant = {name for name in mine if name.endswith("norm.weight")}
    assert not [name for name in set(mine) - constant if torch.equal(mine[name], theirs[name])]
