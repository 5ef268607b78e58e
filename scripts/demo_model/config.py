"""Contents of config.json: what all architectures say, and what each has of its own."""

from __future__ import annotations

from collections.abc import Callable

from scripts.demo_model.architectures import (
    ARCHS,
    MAX_POSITIONS,
    MLA_NOPE_DIM,
    MLA_RANK,
    MLA_ROPE_DIM,
    MLA_V_DIM,
    SHARED_EXPERTS,
)
from scripts.demo_model.checkpoint import Checkpoint

Config = dict[str, object]

_YARN: Config = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": MAX_POSITIONS // 2,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}


def config_of(checkpoint: Checkpoint) -> Config:
    """Everything that config.json of ``checkpoint`` says."""
    shape, attention = checkpoint.shape, checkpoint.attention
    common: Config = {
        "architectures": [ARCHS[checkpoint.arch].class_name],
        "model_type": checkpoint.arch,
        "vocab_size": checkpoint.vocabulary.size,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "num_experts_per_tok": shape.top_k,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": checkpoint.max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": checkpoint.vocabulary.end,
        "pad_token_id": checkpoint.pad,
        "dtype": "bfloat16",
    }
    return common | _OWN[checkpoint.arch](checkpoint)


def _mixtral(checkpoint: Checkpoint) -> Config:
    return {
        "head_dim": checkpoint.attention.head_dim,
        "intermediate_size": checkpoint.shape.intermediate,
        "num_local_experts": checkpoint.shape.experts,
        "sliding_window": None,
    }


def _qwen3_moe(checkpoint: Checkpoint) -> Config:
    return {
        "head_dim": checkpoint.attention.head_dim,
        "intermediate_size": checkpoint.shape.intermediate,
        "moe_intermediate_size": checkpoint.shape.intermediate,
        "num_experts": checkpoint.shape.experts,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _olmoe(checkpoint: Checkpoint) -> Config:
    return {
        "intermediate_size": checkpoint.shape.intermediate,
        "num_experts": checkpoint.shape.experts,
        "norm_topk_prob": False,
        "clip_qkv": None,
    }


def _deepseek_v2(checkpoint: Checkpoint) -> Config:
    return {
        "intermediate_size": checkpoint.networks.dense_width,
        "moe_intermediate_size": checkpoint.shape.intermediate,
        "n_routed_experts": checkpoint.shape.experts,
        "n_shared_experts": SHARED_EXPERTS,
        "first_k_dense_replace": ARCHS["deepseek_v2"].dense_layers,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "q_lora_rank": None,
        "kv_lora_rank": MLA_RANK,
        "qk_nope_head_dim": MLA_NOPE_DIM,
        "qk_rope_head_dim": MLA_ROPE_DIM,
        "v_head_dim": MLA_V_DIM,
        # With plain rotary embedding vLLM 0.32 rotates latent attention wrongly on
        # CPU in eager mode; this type, which real checkpoints have too, is right.
        "rope_parameters": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    }


def _gpt_oss(checkpoint: Checkpoint) -> Config:
    return {
        "head_dim": checkpoint.attention.head_dim,
        "intermediate_size": checkpoint.shape.intermediate,
        "num_local_experts": checkpoint.shape.experts,
        "attention_bias": True,
        "sliding_window": 128,
        "layer_types": [
            "full_attention" if layer % 2 else "sliding_attention"
            for layer in range(checkpoint.shape.layers)
        ],
        "swiglu_limit": 7.0,
        "rope_parameters": _YARN | {"truncate": False},
    }


_OWN: dict[str, Callable[[Checkpoint], Config]] = {
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "deepseek_v2": _deepseek_v2,
    "gpt_oss": _gpt_oss,
}
