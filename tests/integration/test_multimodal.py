"""Models that see: what they answer to text is plain vLLM's, with the experts of their language model
offloaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.integration.conftest import EXPERTS, LAYERS, TOP_K, Run, engine
from tests.integration.test_identity import assert_identical, num_experts, offload

pytestmark = pytest.mark.vllm
ARCH = "deepseek_v2"
VISION = {
    "model_type": "moonvit",
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 64,
    "init_pos_emb_height": 4,
    "init_pos_emb_width": 4,
}


def kimi_vl(model: Path, out: Path) -> Path:
    """The model as the language model of a Kimi-VL, in names as released ones have them."""
    shutil.copytree(model, out)
    tensors: dict = {"vision_tower.patch_embed.proj.weight": torch.zeros(64, 3, 14, 14)}
    for path in out.glob("*.safetensors*"):
        if path.suffix == ".safetensors":
            of_file = load_file(path)
            tensors |= {f"language_model.{name}": value for name, value in of_file.items()}
        path.unlink()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    text = json.loads((out / "config.json").read_text())
    config = {
        "architectures": ["KimiVLForConditionalGeneration"],
        "model_type": "kimi_vl",
        "text_config": text,
        "vision_config": VISION,
        "media_placeholder_token_id": 5,
        "vocab_size": text["vocab_size"],
        "dtype": "bfloat16",
    }
    (out / "config.json").write_text(json.dumps(config))
    return out


TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 1024,
    "norm_topk_prob": True,
}
SIGHT = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2}
MROPE = {"rope_type": "default", "rope_theta": 10000.0}


def qwen3_vl_moe(vocab_size: int) -> torch.nn.Module:
    """Experts of a layer in two tensors."""
    rope = {**MROPE, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    own = {"num_experts": EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": []}
    sight = {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    return transformers.Qwen3VLMoeForConditionalGeneration(
        transformers.Qwen3VLMoeConfig(
            text_config={**TEXT, **own, "vocab_size": vocab_size, "rope_parameters": rope},
            vision_config={**SIGHT, **sight, "out_hidden_size": TEXT["hidden_size"]},
        )
    )


def qwen3_5_moe(vocab_size: int) -> torch.nn.Module:
    """Linear attention, and a shared expert."""
    own = {
        "num_experts": EXPERTS,
        "shared_expert_intermediate_size": 128,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    }
    sight = {"num_position_embeddings": 16, "deepstack_visual_indexes": []}
    return transformers.Qwen3_5MoeForConditionalGeneration(
        transformers.Qwen3_5MoeConfig(
            text_config={**TEXT, **own, "vocab_size": vocab_size},
            vision_config={**SIGHT, **sight, "out_hidden_size": TEXT["hidden_size"]},
        )
    )


def glm4v_moe(vocab_size: int) -> torch.nn.Module:
    """A dense layer first, shared experts, groups of experts and a correction of their scores."""
    rope = {**MROPE, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}
    own = {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1}
    own |= {"use_qk_norm": False}
    return transformers.Glm4vMoeForConditionalGeneration(
        transformers.Glm4vMoeConfig(
            text_config={**TEXT, **own, "vocab_size": vocab_size, "rope_parameters": rope},
            vision_config={**SIGHT, "out_hidden_size": TEXT["hidden_size"], "image_size": 64},
        )
    )


def write_seeing(module: torch.nn.Module, demo: Path, out: Path) -> Path:
    """A model of random weights, as its hub has it, with a demo model's tokenizer."""
    module.to(torch.bfloat16).save_pretrained(out)
    for path in (*demo.glob("*token*"), *demo.glob("*.jinja")):
        shutil.copy(path, out)
    (weights,) = out.glob("*.safetensors")
    tensors = load_file(weights)
    for name, value in tensors.items():
        if ".experts." in name and value.dim() == 3:  # hubs have inputs first
            tensors[name] = value.transpose(1, 2).contiguous()
    save_file(tensors, weights, {"format": "pt"})
    return out


def assert_text_is_answered(
    model: Path, images: dict, share_engines: Run, stores: Path, rows: int
):
    """Two engines that refuse images: one plain, one with half of the experts in slots."""
    double = {"torchvision_double": True}
    no_images = {"limit_mm_per_prompt": images}
    jobs = [
        engine(model, eager=True, **no_images) | double,
        engine(model, eager=True, offload=offload(stores, "50%"), **no_images) | double,
    ]
    results = share_engines(jobs)
    assert_identical(results, [rows])
    assert results[1]["facts"]["misses"] > 0
    assert results[1]["facts"]["prefetch_issued"] > 0, "its routers were found"


def test_text_is_answered_as_by_plain_vllm(demo_model, store_dir, share_engines, tmp_path):
    """Feature: a multi-modal architecture's text, images switched off."""
    model = kimi_vl(demo_model(ARCH), tmp_path / "kimi")
    rows = num_experts(ARCH) // 2
    assert_text_is_answered(model, {"image": 0}, share_engines, store_dir, rows)


@pytest.mark.slow
@pytest.mark.parametrize("make", [qwen3_vl_moe, qwen3_5_moe, glm4v_moe])
def test_other_models_that_see(make, demo_model, store_dir, share_engines, tmp_path):
    """Feature: text of further multi-modal architectures."""
    torch.manual_seed(0)
    demo = demo_model("mixtral")
    vocab_size = json.loads((demo / "config.json").read_text())["vocab_size"]
    model = write_seeing(make(vocab_size), demo, tmp_path / make.__name__)
    rows = EXPERTS * (LAYERS - (make is glm4v_moe)) // 2
    none = {"image": 0, "video": 0}
    assert_text_is_answered(model, none, share_engines, store_dir, rows)
