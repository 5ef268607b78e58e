"""From a config.json of the Hugging Face hub to a :class:`ModelShape`: counting, no code run.

Parameters are counted as vLLM serves them: multi-token-prediction layers are left out, shared
experts are dense (every token uses them).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_moe_offload.plan.shapes.architectures import MODEL_TYPES
from vllm_moe_offload.plan.shapes.base import ModelShape, ShapeError
from vllm_moe_offload.plan.shapes.fields import ConfigFields


def shape_of_config(config: Mapping[str, Any], source: str) -> ModelShape:
    """Shape of the model that a config.json describes.

    Args:
        config: the parsed file.
        source: its name, for messages.

    Raises:
        ShapeError: an unknown architecture, a dense model, or a field missing or wrong.
    """
    model_type = config.get("model_type")
    fields = ConfigFields(config, source)
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
    dense = vocabulary * hidden * (1 if is_tied else 2) + parts.head_biases
    dense += parts.attention + norm * (2 * num_layers + 1)
    dense += num_moe * (hidden * num_experts + parts.router_biases + parts.shared)
    dense += (num_layers - num_moe) * 3 * hidden * parts.dense_width
    extra = fields.integer("num_nextn_predict_layers", default=0, least=0)
    return ModelShape(
        model_type=model_type,
        quantization=_quantization(config, source),
        num_layers=num_layers,
        moe_layers=parts.moe_layers,
        num_experts=num_experts,
        top_k=top_k,
        expert_weights=3 * hidden * parts.expert_width,
        expert_biases=parts.expert_biases,
        dense_parameters=dense,
        lookup_parameters=0 if is_tied else vocabulary * hidden,
        kv=parts.kv,
        max_tokens=fields.integer("max_position_embeddings"),
        extra_expert_layers=tuple(range(num_layers, num_layers + extra)),
    )


def _quantization(config: Mapping[str, Any], source: str) -> str | None:
    """Method of ``quantization_config`` (or of ``quantization``, which MLX writes)."""
    entry = config.get("quantization_config") or config.get("quantization")
    if not entry:
        return None
    if not isinstance(entry, Mapping):
        raise ShapeError(f"{source}: quantization_config={entry!r}, must be an object")
    return str(entry.get("quant_method", "unnamed"))
