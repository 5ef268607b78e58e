"""From a config.json of the Hugging Face hub to a :class:`ModelShape`: counting, no code run.

Parameters are counted as vLLM serves them: multi-token-prediction layers are left out, shared
experts are dense (every token uses them).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vllm_moe_offload.plan.shapes.architectures import MODEL_TYPES, Parts
from vllm_moe_offload.plan.shapes.base import (
    SERVED_BYTES,
    EndsShape,
    LayerShape,
    ModelShape,
    ShapeError,
    shown,
)
from vllm_moe_offload.plan.shapes.fields import ConfigFields
from vllm_moe_offload.plan.shapes.kernel_form import ExpertShape
from vllm_moe_offload.plan.shapes.quantization import Quantization, quantization_of

_ATTENTION, _SHARED, _MLP = r"attn", r"shared_expert", r"\bmlp\W.*_proj"
"""Modules with dense matrices, as lists of what is not quantised name them."""


def shape_of_config(config: Mapping[str, Any], source: str) -> ModelShape:
    """Shape of the model that a config.json describes.

    Args:
        config: the parsed file.
        source: its name, for messages.

    Raises:
        ShapeError: an unknown architecture, a dense model, or a field missing or wrong.
    """
    model_type = config.get("model_type")
    # Models that see have their language model's fields in an object of their own.
    fields = ConfigFields(config, source).joined("text_config")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise ShapeError(
            f"{source}: model_type={shown(model_type)} is not known; known are "
            f"{', '.join(MODEL_TYPES)}"
        )
    parts = MODEL_TYPES[model_type](fields)
    if not parts.moe_layers:
        raise ShapeError(f"{source}: no layer has routed experts; there is nothing to offload")
    num_experts, top_k = fields.num_experts(), fields.top_k()
    if top_k > num_experts:
        raise ShapeError(f"{source}: {top_k} experts per token, but a layer has {num_experts}")
    hidden, vocabulary = fields.integer("hidden_size"), fields.integer("vocab_size")
    num_layers = fields.num_layers()
    norm = hidden if parts.norms is None else parts.norms
    num_moe = len(parts.moe_layers)
    is_tied = fields.flag("tie_word_embeddings")
    rest = vocabulary * hidden * (1 if is_tied else 2) + parts.head_biases
    rest += norm * (2 * num_layers + 1) + parts.vision
    rest += num_moe * (hidden * num_experts + parts.router_biases)
    linear = {
        _ATTENTION: sum(attention.parameters for attention in parts.attention),
        _SHARED: num_moe * parts.shared,
        _MLP: (num_layers - num_moe) * 3 * hidden * parts.dense_width,
    }
    quantization = quantization_of(config, source)
    dense_bytes = rest * SERVED_BYTES + sum(
        math.ceil(count * quantization.dense_bytes_of(module))
        for module, count in linear.items()
    )
    layers = _layers(parts, hidden, num_experts, 2 * norm, quantization)
    embedding_bytes = vocabulary * hidden * SERVED_BYTES
    head_bytes = 0 if is_tied else embedding_bytes + parts.head_biases * SERVED_BYTES
    extra = fields.num_drafter_layers()
    return ModelShape(
        model_type=model_type,
        num_layers=num_layers,
        moe_layers=parts.moe_layers,
        num_experts=num_experts,
        top_k=top_k,
        expert=ExpertShape(
            hidden,
            parts.expert_width,
            has_biases=parts.has_expert_biases,
            activation=parts.activation,
            routing=parts.routing,
        ),
        format=quantization.experts,
        refusal=quantization.refusal,
        dense_parameters=rest + sum(linear.values()),
        dense_bytes=dense_bytes,
        lookup_parameters=0 if is_tied else vocabulary * hidden,
        layers=layers,
        ends=EndsShape(
            embedding_bytes,
            head_bytes,
            rest_bytes=dense_bytes
            - embedding_bytes
            - head_bytes
            - sum(layer.dense_bytes for layer in layers),
            in_every_stage=parts.has_ends_everywhere,
        ),
        attention_heads=fields.integer("num_attention_heads"),
        max_tokens=fields.integer("max_position_embeddings"),
        extra_expert_layers=tuple(range(num_layers, num_layers + extra)),
    )


def _layers(
    parts: Parts, hidden: int, num_experts: int, norms: int, quantization: Quantization
) -> tuple[LayerShape, ...]:
    """Each decoder layer; ``norms``: parameters of its two."""
    moe = norms + hidden * num_experts + parts.router_biases
    shared = parts.shared * quantization.dense_bytes_of(_SHARED)
    mlp = 3 * hidden * parts.dense_width * quantization.dense_bytes_of(_MLP)
    of_attention = quantization.dense_bytes_of(_ATTENTION)
    moe_layers = frozenset(parts.moe_layers)

    def layer(index: int) -> LayerShape:
        attention, has_experts = parts.attention[index], index in moe_layers
        whole = (moe if has_experts else norms) * SERVED_BYTES
        dense = whole + attention.parameters * of_attention + (shared if has_experts else mlp)
        return LayerShape(
            dense_bytes=math.floor(dense),
            whole_bytes=math.floor(whole + attention.whole * of_attention),
            kv=attention.kv,
            kv_heads=attention.kv_heads,
        )

    return tuple(map(layer, range(len(parts.attention))))
