"""From a config.json of the Hugging Face hub to a :class:`ModelShape`: counting, no code run.

Parameters are counted as vLLM serves them: multi-token-prediction layers are left out, shared
experts are dense (every token uses them).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vllm_moe_offload.plan.shapes.architectures import MODEL_TYPES
from vllm_moe_offload.plan.shapes.base import SERVED_BYTES, ModelShape, ShapeError
from vllm_moe_offload.plan.shapes.fields import ConfigFields
from vllm_moe_offload.plan.shapes.kernel_form import ExpertShape
from vllm_moe_offload.plan.shapes.quantization import quantization_of


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
    if model_type not in MODEL_TYPES:
        raise ShapeError(
            f"{source}: model_type={model_type!r} is not known; known are "
            f"{', '.join(MODEL_TYPES)}"
        )
    parts = MODEL_TYPES[model_type](fields)
    if not parts.moe_layers:
        raise ShapeError(f"{source}: no layer has routed experts; there is nothing to offload")
    num_experts, top_k = fields.num_experts(), fields.top_k()
    if top_k > num_experts:
        raise ShapeError(f"{source}: {top_k} experts per token, but a layer has {num_experts}")
    hidden, vocabulary = fields.integer("hidden_size"), fields.integer("vocab_size")
    num_layers = fields.integer("num_hidden_layers")
    norm = hidden if parts.norms is None else parts.norms
    num_moe = len(parts.moe_layers)
    is_tied = fields.flag("tie_word_embeddings")
    rest = vocabulary * hidden * (1 if is_tied else 2) + parts.head_biases
    rest += norm * (2 * num_layers + 1) + parts.vision
    rest += num_moe * (hidden * num_experts + parts.router_biases)
    linear = {
        r"attn": parts.attention,
        r"shared_expert": num_moe * parts.shared,
        r"\bmlp\W.*_proj": (num_layers - num_moe) * 3 * hidden * parts.dense_width,
    }
    quantization = quantization_of(config, source)
    dense_bytes = rest * SERVED_BYTES + sum(
        math.ceil(count * quantization.dense_bytes_of(module))
        for module, count in linear.items()
    )
    extra = fields.integer("num_nextn_predict_layers", default=0, least=0)
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
        kv=parts.kv,
        max_tokens=fields.integer("max_position_embeddings"),
        extra_expert_layers=tuple(range(num_layers, num_layers + extra)),
    )
