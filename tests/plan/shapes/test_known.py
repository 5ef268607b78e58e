"""The table of well-known models: against published totals, and against transformers' models."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from vllm_moe_offload.plan.shapes import kernel_form, known_models, shape_of_config
from vllm_moe_offload.plan.shapes.kernel_form import BF16
from vllm_moe_offload.plan.shapes.known import find_known

PUBLISHED_BILLIONS = {
    "Mixtral-8x7B": 46.7,
    "Mixtral-8x22B": 141,
    "Qwen3-30B-A3B": 30.5,
    "Qwen3-30B-A3B-FP8": 30.5,
    "Qwen3-Coder-30B-A3B": 30.5,
    "Qwen3-235B-A22B": 235,
    "Qwen3-235B-A22B-FP8": 235,
    "Qwen3-Coder-480B-A35B": 480,
    "Qwen3-Next-80B-A3B": 80,
    "Qwen3.5-35B-A3B": 35,
    "Qwen3.5-122B-A10B": 122,
    "Qwen3.5-397B-A17B": 397,
    "DeepSeek-V2-Lite": 15.7,
    "DeepSeek-V3": 671,
    "DeepSeek-R1": 671,
    "Kimi-K2": 1030,
    "GLM-4.5-Air": 106,
    "MiniMax-M2.5": 229,
    "MiniMax-M2.7": 229,
    "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 116.8,
    "OLMoE-1B-7B": 6.9,
    "Phi-3.5-MoE": 41.9,
}
EXPERT_BYTES = {  # bf16; design figures, independent of the table
    "Mixtral-8x7B": 352_321_536,
    "Qwen3-30B-A3B": 9_437_184,
    "DeepSeek-V2-Lite": 17_301_504,
    "gpt-oss-20b": 49_783_680,
    "gpt-oss-120b": 49_783_680,
    "DeepSeek-V3": 88_080_384,
}
KV_BYTES_PER_TOKEN = {
    "Mixtral-8x7B": 2 * 32 * 8 * 128 * 2,
    "Qwen3-Next-80B-A3B": 2 * 12 * 2 * 256 * 2,  # every fourth layer
    "DeepSeek-V2-Lite": 27 * (512 + 64) * 2,
    "gpt-oss-20b": 2 * 12 * 8 * 64 * 2,  # every second layer; the others have a window
}


def shape_of(name):
    model = known_models()[name]
    return shape_of_config(model.config, model.source)


def test_every_model_is_published_and_names_its_source():
    assert set(known_models()) == set(PUBLISHED_BILLIONS)
    for model in known_models().values():
        assert model.model_id in model.source


@pytest.mark.parametrize("name", PUBLISHED_BILLIONS)
def test_total_parameters_are_the_published(name):
    assert shape_of(name).parameters / 1e9 == pytest.approx(PUBLISHED_BILLIONS[name], rel=0.01)


@pytest.mark.parametrize("name", PUBLISHED_BILLIONS)
def test_total_parameters_are_those_of_the_model_code(name):
    """transformers' model on the meta device: every tensor, nothing allocated."""
    config = dict(known_models()[name].config)
    config.pop("quantization_config", None)
    if config["model_type"] == "kimi_k2":  # DeepSeek-V3's code under another name
        config["model_type"] = "deepseek_v3"
    kind = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(AutoConfig.for_model(**config))
    tensors = [*model.parameters()]
    tensors += [value for key, value in model.named_buffers() if "e_score_correction" in key]
    assert shape_of(name).parameters == sum(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize("name", EXPERT_BYTES)
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_expert_bytes(name, platform):
    layout = kernel_form(BF16, platform, shape_of(name).expert)
    assert layout.expert_bytes == EXPERT_BYTES[name]


def test_dense_weights_of_fp8_checkpoints_are_fp8_but_for_embeddings():
    whole, half = shape_of("Qwen3-30B-A3B"), shape_of("Qwen3-30B-A3B-FP8")
    assert half.dense_parameters == whole.dense_parameters
    attention = 48 * (2048 * 128 * (32 + 32 + 4 + 4) + 2 * 128)
    saved = whole.dense_bytes - half.dense_bytes
    assert saved == pytest.approx(attention, rel=1e-3)
    assert shape_of("gpt-oss-20b").dense_bytes == 2 * shape_of("gpt-oss-20b").dense_parameters


@pytest.mark.parametrize("name", KV_BYTES_PER_TOKEN)
def test_kv_bytes_per_token(name):
    assert shape_of(name).kv.bytes_per_token == KV_BYTES_PER_TOKEN[name]


def test_window_and_state_are_per_request():
    window = shape_of("gpt-oss-20b").kv
    assert window.bytes_per_request(1000) == 12 * 2 * 8 * 64 * 2 * (128 + 1000)
    state = shape_of("Qwen3-Next-80B-A3B").kv
    assert state.bytes_per_request(1000) == 36 * 2 * (8192 * 3 + 32 * 128 * 128)
    assert shape_of("Mixtral-8x7B").kv.bytes_per_request(1000) == 0


@pytest.mark.parametrize(
    "text", ["mixtral-8x7b", "Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-v0.1"]
)
def test_models_are_found_by_name_and_id(text):
    found = find_known(text)
    assert found is not None
    assert found.name == "Mixtral-8x7B"
    assert find_known("Mixtral-9x9B") is None
