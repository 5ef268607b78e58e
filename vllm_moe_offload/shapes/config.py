"""From a config.json of the Hugging Face hub to a :class:`ModelShape`: counting, no code run.

Parameters are counted as vLLM serves them: multi-token-prediction layers are left out, shared
experts are dense (every token uses them). Compared with transformers' own models in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_moe_offload.shapes.base import KvShape, ModelShape, ShapeError

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
_TOP_K = ("num_experts_per_tok", "experts_per_token")


class _Fields:
    """A config.json's fields, checked."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self._config = config
        self._source = source

    def integer(self, *names: str, default: int | None = None, least: int = 1) -> int:
        for name in names:
            value = self._config.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ShapeError(
                    f"{self._source}: {name}={value!r}, must be an integer of {least} or more"
                )
            return value
        if default is None:
            raise ShapeError(f"{self._source}: {' or '.join(names)} is missing")
        return default

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._config.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ShapeError(f"{self._source}: {name}={value!r}, must be true or false")
        return value

    def has(self, name: str) -> bool:
        return self._config.get(name) is not None

    def integers(self, name: str) -> set[int]:
        value = self._config.get(name) or []
        if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
            raise ShapeError(f"{self._source}: {name}={value!r}, must be a list of integers")
        return set(value)

    def layer_kinds(self, otherwise: Callable[[int], str]) -> list[str]:
        """``layer_types``, or a rule for configs that leave it out."""
        count = self.integer("num_hidden_layers")
        kinds = self._config.get("layer_types")
        if kinds is None:
            return [otherwise(layer) for layer in range(count)]
        if not isinstance(kinds, list) or len(kinds) != count:
            raise ShapeError(
                f"{self._source}: layer_types must be a list of num_hidden_layers={count} kinds"
            )
        return [str(kind) for kind in kinds]


@dataclass(frozen=True, slots=True)
class _Parts:
    """What distinguishes one architecture from another.

    Attributes:
        attention: parameters of all layers' attention.
        kv: KV cache.
        moe_layers: layers with routed experts.
        expert_width: of one routed expert.
        dense_width: of the MLP of layers without experts.
        shared: parameters per MoE layer of shared experts, their gate included.
        router_biases: per MoE layer.
        expert_biases: of one expert.
        norms: parameters of one norm over the hidden state.
        head_biases: of the output layer.
    """

    attention: int
    kv: KvShape
    moe_layers: tuple[int, ...]
    expert_width: int
    dense_width: int = 0
    shared: int = 0
    router_biases: int = 0
    expert_biases: int = 0
    norms: int | None = None
    head_biases: int = 0


def _every_layer(fields: _Fields) -> tuple[int, ...]:
    return tuple(range(fields.integer("num_hidden_layers")))


def _heads(fields: _Fields) -> tuple[int, int, int]:
    """Query heads, key-value heads, elements of a head."""
    heads = fields.integer("num_attention_heads")
    head = fields.integer("head_dim", default=fields.integer("hidden_size") // heads)
    return heads, fields.integer("num_key_value_heads", default=heads), head


def _attention(fields: _Fields, bias: bool = False, gate: bool = False) -> tuple[int, int]:
    """Parameters of one layer's grouped-query attention; KV elements per token."""
    hidden = fields.integer("hidden_size")
    heads, kv_heads, head = _heads(fields)
    queries, keys = heads * head, kv_heads * head
    count = hidden * (queries * (3 if gate else 2) + 2 * keys)
    if bias:
        count += queries + 2 * keys + hidden
    return count, 2 * keys


def _mixtral(fields: _Fields) -> _Parts:
    attention, kv = _attention(fields)
    layers = _every_layer(fields)
    return _Parts(
        attention * len(layers),
        KvShape(kv * len(layers)),
        layers,
        fields.integer("intermediate_size"),
    )


def _phimoe(fields: _Fields) -> _Parts:
    attention, kv = _attention(fields, bias=fields.flag("attention_bias"))
    layers = _every_layer(fields)
    return _Parts(
        attention * len(layers),
        KvShape(kv * len(layers)),
        layers,
        fields.integer("intermediate_size"),
        norms=2 * fields.integer("hidden_size"),  # LayerNorm: weight and bias
        head_biases=fields.integer("vocab_size") if fields.flag("lm_head_bias") else 0,
    )


def _olmoe(fields: _Fields) -> _Parts:
    attention, kv = _attention(fields, bias=fields.flag("attention_bias"))
    layers = _every_layer(fields)
    heads, kv_heads, head = _heads(fields)
    qk_norms = (heads + kv_heads) * head
    return _Parts(
        (attention + qk_norms) * len(layers),
        KvShape(kv * len(layers)),
        layers,
        fields.integer("intermediate_size"),
    )


def _sparse_layers(fields: _Fields) -> tuple[int, ...]:
    """Of Qwen's models: every n-th layer, less those named."""
    step = fields.integer("decoder_sparse_step", default=1)
    dense = fields.integers("mlp_only_layers")
    return tuple(
        layer
        for layer in _every_layer(fields)
        if layer not in dense and (layer + 1) % step == 0
    )


def _qwen3_moe(fields: _Fields) -> _Parts:
    attention, kv = _attention(fields, bias=fields.flag("attention_bias"))
    _, _, head = _heads(fields)
    count = fields.integer("num_hidden_layers")
    return _Parts(
        (attention + 2 * head) * count,
        KvShape(kv * count),
        _sparse_layers(fields),
        fields.integer("moe_intermediate_size"),
        dense_width=fields.integer("intermediate_size", default=0, least=0),
    )


def _qwen3_next(fields: _Fields) -> _Parts:
    interval = fields.integer("full_attention_interval", default=4)
    kinds = fields.layer_kinds(
        lambda layer: "linear_attention" if (layer + 1) % interval else "full_attention"
    )
    num_linear = kinds.count("linear_attention")
    num_full = len(kinds) - num_linear
    full, kv = _attention(fields, bias=fields.flag("attention_bias"), gate=True)
    _, _, head = _heads(fields)
    linear, state = _gated_delta_net(fields)
    hidden = fields.integer("hidden_size")
    shared_width = fields.integer("shared_expert_intermediate_size", default=0, least=0)
    return _Parts(
        num_full * (full + 2 * head) + num_linear * linear,
        KvShape(kv * num_full, state_per_request=state * num_linear),
        _sparse_layers(fields),
        fields.integer("moe_intermediate_size"),
        dense_width=fields.integer("intermediate_size", default=0, least=0),
        shared=3 * hidden * shared_width + hidden if shared_width else 0,
    )


def _gated_delta_net(fields: _Fields) -> tuple[int, int]:
    """Parameters and state elements of one linear-attention layer of Qwen3-Next."""
    hidden = fields.integer("hidden_size")
    key_heads = fields.integer("linear_num_key_heads")
    value_heads = fields.integer("linear_num_value_heads")
    key_head = fields.integer("linear_key_head_dim")
    value_head = fields.integer("linear_value_head_dim")
    kernel = fields.integer("linear_conv_kernel_dim")
    keys, values = key_heads * key_head, value_heads * value_head
    channels = 2 * keys + values
    projections = hidden * (2 * keys + 2 * values + 2 * value_heads) + values * hidden
    parameters = projections + channels * kernel + 2 * value_heads + value_head
    return parameters, channels * (kernel - 1) + value_heads * key_head * value_head


def _deepseek(fields: _Fields) -> _Parts:
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    nope, rope = fields.integer("qk_nope_head_dim"), fields.integer("qk_rope_head_dim")
    value, latent = fields.integer("v_head_dim"), fields.integer("kv_lora_rank")
    queries = heads * (nope + rope)
    if fields.has("q_lora_rank"):
        rank = fields.integer("q_lora_rank")
        count = hidden * rank + rank + rank * queries
    else:
        count = hidden * queries
    count += hidden * (latent + rope) + latent
    count += latent * heads * (nope + value) + heads * value * hidden
    layers = _every_layer(fields)
    first = fields.integer("first_k_dense_replace", default=0, least=0)
    frequency = fields.integer("moe_layer_freq", default=1)
    width = fields.integer("moe_intermediate_size")
    shared = fields.integer("n_shared_experts", default=0, least=0)
    return _Parts(
        count * len(layers),
        KvShape((latent + rope) * len(layers)),  # the latent; heads are computed from it
        tuple(layer for layer in layers if layer >= first and layer % frequency == 0),
        width,
        dense_width=fields.integer("intermediate_size"),
        shared=3 * hidden * width * shared,
    )


def _deepseek_v3(fields: _Fields) -> _Parts:
    parts = _deepseek(fields)
    experts = fields.integer(*_EXPERT_COUNTS)
    return _Parts(
        parts.attention,
        parts.kv,
        parts.moe_layers,
        parts.expert_width,
        parts.dense_width,
        parts.shared,
        router_biases=experts,  # e_score_correction_bias
    )


def _gpt_oss(fields: _Fields) -> _Parts:
    attention, kv = _attention(fields, bias=fields.flag("attention_bias", default=True))
    heads, _, _ = _heads(fields)
    hidden, width = fields.integer("hidden_size"), fields.integer("intermediate_size")
    kinds = fields.layer_kinds(
        lambda layer: "full_attention" if layer % 2 else "sliding_attention"
    )
    num_sliding = kinds.count("sliding_attention")
    return _Parts(
        (attention + heads) * len(kinds),  # a sink per head
        KvShape(
            kv * (len(kinds) - num_sliding),
            window_per_token=kv * num_sliding,
            window_tokens=fields.integer("sliding_window") if num_sliding else 0,
        ),
        tuple(range(len(kinds))),
        width,
        router_biases=fields.integer(*_EXPERT_COUNTS),
        expert_biases=2 * width + hidden,
    )


MODEL_TYPES: dict[str, Callable[[_Fields], _Parts]] = {
    "mixtral": _mixtral,
    "phimoe": _phimoe,
    "olmoe": _olmoe,
    "qwen3_moe": _qwen3_moe,
    "qwen3_next": _qwen3_next,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
}
"""Architectures whose parameters are counted here."""


def shape_of_config(config: Mapping[str, Any], source: str) -> ModelShape:
    """Shape of the model that a config.json describes.

    Args:
        config: the parsed file.
        source: its name, for messages.

    Raises:
        ShapeError: an unknown architecture, a dense model, or a field missing or wrong.
    """
    model_type = config.get("model_type")
    fields = _Fields(config, source)
    if model_type not in MODEL_TYPES:
        raise ShapeError(
            f"{source}: model_type={model_type!r} is not known; known are "
            f"{', '.join(MODEL_TYPES)}"
        )
    parts = MODEL_TYPES[model_type](fields)
    if not parts.moe_layers:
        raise ShapeError(f"{source}: no layer has routed experts; there is nothing to offload")
    num_experts, top_k = fields.integer(*_EXPERT_COUNTS), fields.integer(*_TOP_K)
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
