"""Tiny checkpoints to speculate with: layers of multi-token prediction, and a dense drafter.

They are made of the demo models' parts (see :mod:`scripts.demo_model`), so that generated text
has a structure: what a drafter proposes is accepted often, and often not. All of them have one
vocabulary, and the demo models of seed 0 have it too: each can draft for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from scripts.demo_model import TOPICS, Shape
from scripts.demo_model.architectures import (
    ALIGNMENT,
    MAX_POSITIONS,
    MLA_NOPE_DIM,
    MLA_RANK,
    MLA_ROPE_DIM,
    MLA_V_DIM,
    SHARED_EXPERTS,
)
from scripts.demo_model.attention import Attention, LatentAttention
from scripts.demo_model.networks import Networks
from scripts.demo_model.plant import Plant
from scripts.demo_model.seeded import generator
from scripts.demo_model.tokenizer import PAD, Vocabulary, train_tokenizer
from scripts.demo_model.weights import Weight, constant, gaussian
from scripts.demo_model.write import write_json, write_tokenizer

MTP_ARCHS = ("deepseek_v3", "glm4_moe")
DENSE_LAYERS = 1
"""Leading layers without experts, of those with multi-token prediction."""

QUERY_RANK = 96
"""Width of the latent that DeepSeek-V3 computes queries from."""

BIAS_NAME = "e_score_correction_bias"
"""Of a router: added to scores when experts are chosen, not when they are weighted; float32."""


class SplitQueries(LatentAttention):
    """DeepSeek-V3's attention: queries come from a latent of their own."""

    def weights(self, prefix: str) -> Iterator[Weight]:
        """See :class:`Attention`."""
        hidden, heads = self.shape.hidden, self.heads
        for weight in super().weights(prefix):
            if weight.name != f"{prefix}.q_proj.weight":
                yield weight
        yield Weight(f"{prefix}.q_a_proj.weight", (QUERY_RANK, hidden), self._query_latent)
        yield constant(f"{prefix}.q_a_layernorm.weight", QUERY_RANK)
        yield Weight(
            f"{prefix}.q_b_proj.weight",
            (heads * (MLA_NOPE_DIM + MLA_ROPE_DIM), QUERY_RANK),
            self._query_heads,
        )

    def _query_latent(self, rng: torch.Generator) -> Tensor:
        """[rank, H]: how much of the constant a token has, then noise."""
        hidden = self.shape.hidden
        rows = torch.randn(QUERY_RANK, hidden, generator=rng, dtype=torch.float64)
        rows[0] = math.sqrt(hidden) * self.plant.anchor
        return rows / math.sqrt(hidden)

    def _query_heads(self, rng: torch.Generator) -> Tensor:
        """[heads * (nope + rope), rank]: rotary parts are the same for every token."""
        width = MLA_NOPE_DIM + MLA_ROPE_DIM
        rows = torch.randn(self.heads, width, QUERY_RANK, generator=rng, dtype=torch.float64)
        rows *= 0.2 / math.sqrt(QUERY_RANK)
        rows[:, MLA_NOPE_DIM:, 0] += self.key_size
        return rows.reshape(-1, QUERY_RANK)


class _Model:
    """Parts of one model and the names of its tensors, as published checkpoints have them."""

    def __init__(self, arch: str, shape: Shape, seed: int) -> None:
        self.arch, self.shape = arch, shape
        self.tokenizer = train_tokenizer(0)
        topics = min(len(TOPICS), shape.hidden // 4)
        self.vocabulary = Vocabulary.of(self.tokenizer, topics)
        # Words and what follows them are seed 0's in all models: drafters agree on them.
        self.plant = Plant(0, shape.hidden, topics, self.vocabulary)
        kind = SplitQueries if arch == "deepseek_v3" else Attention
        self.attention = kind(arch, shape, self.plant)
        # Names of a network's tensors are DeepSeek's in all of these architectures.
        self.networks = Networks("deepseek_v2", shape, seed, self.plant, shared_noise=False)

    @property
    def table(self) -> tuple[int, int]:
        """Shape of the embeddings."""
        return self.vocabulary.size, self.shape.hidden

    def weights(self, mtp_layers: int) -> Iterator[Weight]:
        """Every tensor of the model, and ``mtp_layers`` layers behind its last."""
        yield self._embedding("model.embed_tokens.weight")
        for layer in range(self.shape.layers):
            yield from self._layer(layer)
        yield constant("model.norm.weight", self.shape.hidden)
        yield self._head("lm_head.weight")
        for layer in range(self.shape.layers, self.shape.layers + mtp_layers):
            yield from self._mtp(layer)

    def _embedding(self, name: str) -> Weight:
        return Weight(name, self.table, lambda rng: self.plant.embedding())

    def _head(self, name: str) -> Weight:
        read_words = self.attention.value_width - len(self.plant.topics)
        return Weight(name, self.table, lambda rng: self.plant.output(read_words))

    def _layer(self, layer: int) -> Iterator[Weight]:
        prefix, experts = f"model.layers.{layer}", self.shape.experts
        yield constant(f"{prefix}.input_layernorm.weight", self.shape.hidden)
        yield from self.attention.weights(f"{prefix}.self_attn")
        yield constant(f"{prefix}.post_attention_layernorm.weight", self.shape.hidden)
        dense = self.arch == "llama" or layer < DENSE_LAYERS
        # Dense layers are the first in Networks.
        yield from self.networks.weights(prefix, 0 if dense else layer)
        if not dense:
            yield gaussian(f"{prefix}.mlp.gate.{BIAS_NAME}", (experts,), 0.1)

    def _mtp(self, layer: int) -> Iterator[Weight]:
        prefix, hidden = f"model.layers.{layer}", self.shape.hidden
        yield self._embedding(f"{prefix}.embed_tokens.weight")
        yield constant(f"{prefix}.enorm.weight", hidden)
        yield constant(f"{prefix}.hnorm.weight", hidden)
        yield Weight(f"{prefix}.eh_proj.weight", (hidden, 2 * hidden), lambda rng: self._mix())
        yield from self._layer(layer)
        yield constant(f"{prefix}.shared_head.norm.weight", hidden)
        yield self._head(f"{prefix}.shared_head.head.weight")

    def eagle_weights(self) -> Iterator[Weight]:
        """Tensors of an EAGLE head: layers behind one that mixes, without the embeddings.

        The first layer is given what is mixed as it is, without a norm.
        """
        hidden = self.shape.hidden
        yield Weight("fc.weight", (hidden, 2 * hidden), lambda rng: self._mix())
        for layer in range(self.shape.layers):
            for weight in self._layer(layer):
                name = weight.name.removeprefix("model.")
                if name != "layers.0.input_layernorm.weight":
                    yield replace(weight, name=name)

    def _mix(self) -> Tensor:
        """[H, 2H]: the last word as it is, and some of what the model made of those before."""
        identity = torch.eye(self.shape.hidden, dtype=torch.float64)
        return torch.cat([identity, 0.3 * identity], dim=1)

    def config(self) -> dict[str, Any]:
        """What config.json says of all architectures."""
        return {
            "model_type": self.arch,
            "vocab_size": self.vocabulary.size,
            "hidden_size": self.shape.hidden,
            "intermediate_size": self.networks.dense_width,
            "num_hidden_layers": self.shape.layers,
            "num_attention_heads": self.attention.heads,
            "num_key_value_heads": self.attention.kv_heads,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": MAX_POSITIONS,
            "attention_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": self.vocabulary.end,
            "pad_token_id": self.tokenizer.token_to_id(PAD),
            "dtype": "bfloat16",
        }


def _experts_config(shape: Shape) -> dict[str, Any]:
    return {
        "moe_intermediate_size": shape.intermediate,
        "n_routed_experts": shape.experts,
        "n_shared_experts": SHARED_EXPERTS,
        "num_experts_per_tok": shape.top_k,
        "first_k_dense_replace": DENSE_LAYERS,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    }


def _own_config(model: _Model) -> dict[str, Any]:
    if model.arch == "deepseek_v3":
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            **_experts_config(model.shape),
            "moe_layer_freq": 1,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": QUERY_RANK,
            "kv_lora_rank": MLA_RANK,
            "qk_nope_head_dim": MLA_NOPE_DIM,
            "qk_rope_head_dim": MLA_ROPE_DIM,
            "v_head_dim": MLA_V_DIM,
            "rope_scaling": {
                "type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": MAX_POSITIONS // 2,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
            "rope_theta": 10000.0,
        }
    if model.arch == "glm4_moe":
        return {
            "architectures": ["Glm4MoeForCausalLM"],
            **_experts_config(model.shape),
            "n_group": 1,
            "topk_group": 1,
            "use_qk_norm": False,
            "head_dim": model.attention.head_dim,
            "partial_rotary_factor": 0.5,
            "rope_theta": 10000.0,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "head_dim": model.attention.head_dim,
        "mlp_bias": False,
        "rope_theta": 10000.0,
    }


def _write(out: Path, model: _Model, seed: int, weights: Iterable[Weight], **more: Any) -> Path:
    tensors = {}
    for weight in weights:
        kind = torch.float32 if weight.name.endswith(BIAS_NAME) else torch.bfloat16
        made = weight.make(generator(seed, weight.name)).to(kind)
        assert made.shape == weight.shape, weight.name
        tensors[weight.name] = made.contiguous()
    out.mkdir(parents=True)
    write_tokenizer(out, model.tokenizer, MAX_POSITIONS)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", model.config() | _own_config(model) | more)
    return out


def write_mtp_model(
    out: Path,
    arch: str,
    *,
    layers: int = 3,
    experts: int = 8,
    top_k: int = 2,
    hidden: int = 128,
    intermediate: int = 4 * ALIGNMENT,
    mtp_layers: int = 1,
    seed: int = 0,
) -> Path:
    """Writes a model of :data:`MTP_ARCHS` into a new directory; its first layer is dense.

    Behind its ``layers`` come ``mtp_layers`` whole ones with experts of their own, numbered on.
    The same arguments give the same bytes.
    """
    assert arch in MTP_ARCHS, arch
    model = _Model(arch, Shape(layers, experts, top_k, hidden, intermediate), seed)
    weights = model.weights(mtp_layers)
    return _write(out, model, seed, weights, num_nextn_predict_layers=mtp_layers)


def _dense(layers: int, hidden: int, seed: int) -> _Model:
    shape = Shape(layers, experts=2, top_k=1, hidden=hidden, intermediate=ALIGNMENT)
    return _Model("llama", shape, seed)


def write_dense_model(out: Path, *, layers: int = 2, hidden: int = 128, seed: int = 1) -> Path:
    """Writes a model without experts (``llama``) into a new directory: a drafter for the others."""
    model = _dense(layers, hidden, seed)
    return _write(out, model, seed, model.weights(0))


def write_eagle_head(out: Path, *, hidden: int = 128, seed: int = 2) -> Path:
    """Writes an EAGLE head of one layer without experts into a new directory: a drafter for models
    of the same ``hidden`` size, whose embeddings it shares."""
    model = _dense(1, hidden, seed)
    return _write(out, model, seed, model.eagle_weights())
