"""Models that see: what they answer to text is plain vLLM's, with the experts of their language model
offloaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.integration.conftest import engine
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


def test_text_is_answered_as_by_plain_vllm(demo_model, store_dir, share_engines, tmp_path):
    """Feature: a multi-modal architecture's text, images switched off."""
    model = kimi_vl(demo_model(ARCH), tmp_path / "kimi")
    no_images = {"limit_mm_per_prompt": {"image": 0}}
    jobs = [
        engine(model, eager=True, **no_images),
        engine(model, eager=True, offload=offload(store_dir, "50%"), **no_images),
    ]
    results = share_engines(jobs)
    assert_identical(results, [num_experts(ARCH) // 2])
    assert results[1]["facts"]["misses"] > 0
    assert results[1]["facts"]["prefetch_issued"] > 0, "its routers were found"
