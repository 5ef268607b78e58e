"""The parts of each architecture, counted from its config.json.

Compared with transformers' own models in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from vllm_moe_offload.plan.shapes.base import KvShape
from vllm_moe_offload.plan.shapes.fields import ConfigFields


@dataclass(frozen=True, slots=True)
class Attention:
    """Of one layer.

    Attributes:
        parameters: of its matrices, biases and norms of its own.
        kv: KV cache.
        kv_heads: see :class:`LayerShape`.
        whole: of its parameters, projections that tensor-parallel ranks do not split.
    """

    parameters: int
    kv: KvShape
    kv_heads: int
    whole: int = 0


@dataclass(frozen=True, slots=True)
class Parts:
    """What distinguishes one architecture from another.

    Attributes:
        attention: of each layer.
        moe_layers: layers with routed experts.
        expert_width: of one routed expert.
        dense_width: of the MLP of layers without experts.
        shared: parameters per MoE layer of shared experts, their gate included.
        router_biases: per MoE layer.
        has_expert_biases: whether experts have them.
        activation, routing: see :class:`ExpertShape`.
        norms: parameters of one norm over the hidden state.
        head_biases: of the output layer.
        vision: parameters of the encoder of images.
        has_ends_everywhere: see ``in_every_stage`` of :class:`EndsShape`.
    """

    attention: tuple[Attention, ...]
    moe_layers: tuple[int, ...]
    expert_width: int
    dense_width: int = 0
    shared: int = 0
    router_biases: int = 0
    has_expert_biases: bool = False
    activation: Literal["silu", "swigluoai"] = "silu"
    routing: Literal["softmax", "grouped_sigmoid", "other"] = "softmax"
    norms: int | None = None
    head_biases: int = 0
    vision: int = 0
    has_ends_everywhere: bool = True


def _every_layer(fields: ConfigFields) -> tuple[int, ...]:
    return tuple(range(fields.num_layers()))


def _heads(fields: ConfigFields) -> tuple[int, int, int]:
    """Query heads, key-value heads, elements of a head."""
    heads = fields.integer("num_attention_heads")
    head = fields.integer("head_dim", default=fields.integer("hidden_size") // heads)
    return heads, fields.integer("num_key_value_heads", default=heads), head


def _attention(
    fields: ConfigFields, *, bias: bool = False, gate: bool = False, more: int = 0
) -> Attention:
    """Of one layer with grouped queries; ``more`` parameters beside matrices and biases."""
    hidden = fields.integer("hidden_size")
    heads, kv_heads, head = _heads(fields)
    queries, keys = heads * head, kv_heads * head
    count = hidden * (queries * (3 if gate else 2) + 2 * keys)
    if bias:
        count += queries + 2 * keys + hidden
    return Attention(count + more, KvShape(2 * keys), kv_heads)


def _mixtral(fields: ConfigFields) -> Parts:
    layers = _every_layer(fields)
    return Parts(
        (_attention(fields),) * len(layers), layers, fields.integer("intermediate_size")
    )


def _phimoe(fields: ConfigFields) -> Parts:
    attention = _attention(fields, bias=fields.flag("attention_bias"))
    layers = _every_layer(fields)
    return Parts(
        (attention,) * len(layers),
        layers,
        fields.integer("intermediate_size"),
        routing="other",
        norms=2 * fields.integer("hidden_size"),  # LayerNorm: weight and bias
        head_biases=fields.integer("vocab_size") if fields.flag("lm_head_bias") else 0,
    )


def _olmoe(fields: ConfigFields) -> Parts:
    layers = _every_layer(fields)
    heads, kv_heads, head = _heads(fields)
    qk_norms = (heads + kv_heads) * head
    attention = _attention(fields, bias=fields.flag("attention_bias"), more=qk_norms)
    return Parts((attention,) * len(layers), layers, fields.integer("intermediate_size"))


def _sparse_layers(fields: ConfigFields) -> tuple[int, ...]:
    """Of Qwen's models: every n-th layer, less those named."""
    step = fields.integer("decoder_sparse_step", default=1)
    dense = fields.integers("mlp_only_layers")
    return tuple(
        layer
        for layer in _every_layer(fields)
        if layer not in dense and (layer + 1) % step == 0
    )


def _qwen3_moe(fields: ConfigFields) -> Parts:
    _, _, head = _heads(fields)
    attention = _attention(fields, bias=fields.flag("attention_bias"), more=2 * head)
    return Parts(
        (attention,) * fields.num_layers(),
        _sparse_layers(fields),
        fields.integer("moe_intermediate_size"),
        dense_width=fields.integer("intermediate_size", default=0, least=0),
    )


def _qwen3_next(fields: ConfigFields) -> Parts:
    interval = fields.integer("full_attention_interval", default=4)
    kinds = fields.layer_kinds(
        lambda layer: "linear_attention" if (layer + 1) % interval else "full_attention"
    )
    _, _, head = _heads(fields)
    full = _attention(fields, bias=fields.flag("attention_bias"), gate=True, more=2 * head)
    linear = _gated_delta_net(fields)
    hidden = fields.integer("hidden_size")
    shared_width = fields.integer("shared_expert_intermediate_size", default=0, least=0)
    return Parts(
        tuple(linear if kind == "linear_attention" else full for kind in kinds),
        _sparse_layers(fields),
        fields.integer("moe_intermediate_size"),
        dense_width=fields.integer("intermediate_size", default=0, least=0),
        shared=3 * hidden * shared_width + hidden if shared_width else 0,
    )


def _qwen3_5_moe(fields: ConfigFields) -> Parts:
    return replace(_qwen3_next(fields), vision=_vision(fields.nested("vision_config")))


def _vision(fields: ConfigFields) -> int:
    """Parameters of Qwen3.5's encoder of images."""
    hidden, width = fields.integer("hidden_size"), fields.integer("intermediate_size")
    pixels = fields.integer("in_channels") * fields.integer("patch_size") ** 2
    embeddings = pixels * fields.integer("temporal_patch_size") * hidden + hidden
    embeddings += fields.integer("num_position_embeddings") * hidden
    attention = 4 * (hidden * hidden + hidden)
    mlp = 2 * hidden * width + width + hidden
    blocks = fields.integer("depth") * (attention + mlp + 4 * hidden)
    merged = hidden * fields.integer("spatial_merge_size") ** 2
    out = fields.integer("out_hidden_size")
    return embeddings + blocks + 2 * hidden + merged * merged + merged + merged * out + out


def _gated_delta_net(fields: ConfigFields) -> Attention:
    """Of one linear-attention layer of Qwen3-Next."""
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
    state = channels * (kernel - 1) + value_heads * key_head * value_head
    return Attention(parameters, KvShape(0, state_per_request=state), key_heads)


def _deepseek(fields: ConfigFields) -> Parts:
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    nope, rope = fields.integer("qk_nope_head_dim"), fields.integer("qk_rope_head_dim")
    value, latent = fields.integer("v_head_dim"), fields.integer("kv_lora_rank")
    queries = heads * (nope + rope)
    whole = hidden * (latent + rope) + latent
    if fields.has("q_lora_rank"):
        rank = fields.integer("q_lora_rank")
        whole += hidden * rank + rank
        count = rank * queries
    else:
        count = hidden * queries
    count += latent * heads * (nope + value) + heads * value * hidden
    kv = KvShape(latent + rope)  # the latent; heads are computed from it
    layers = _every_layer(fields)
    first = fields.integer("first_k_dense_replace", default=0, least=0)
    frequency = fields.integer("moe_layer_freq", default=1)
    width = fields.integer("moe_intermediate_size")
    shared = fields.integer("n_shared_experts", default=0, least=0)
    return Parts(
        (Attention(count + whole, kv, kv_heads=0, whole=whole),) * len(layers),
        tuple(layer for layer in layers if layer >= first and layer % frequency == 0),
        width,
        dense_width=fields.integer("intermediate_size"),
        shared=3 * hidden * width * shared,
        has_ends_everywhere=False,
    )


def _deepseek_v3(fields: ConfigFields) -> Parts:
    parts = _deepseek(fields)
    experts = fields.num_experts()  # e_score_correction_bias
    return replace(parts, router_biases=experts, routing="grouped_sigmoid")


def _glm4_moe(fields: ConfigFields) -> Parts:
    heads, kv_heads, head = _heads(fields)
    more = 0
    if fields.flag("attention_bias"):
        more += (heads + 2 * kv_heads) * head  # none of the output
    if fields.flag("use_qk_norm"):
        more += 2 * head
    layers = _every_layer(fields)
    first = fields.integer("first_k_dense_replace", default=1, least=0)
    width = fields.integer("moe_intermediate_size")
    shared = fields.integer("n_shared_experts", default=1, least=0)
    return Parts(
        (_attention(fields, more=more),) * len(layers),
        layers[first:],
        width,
        dense_width=fields.integer("intermediate_size"),
        shared=3 * fields.integer("hidden_size") * width * shared,
        router_biases=fields.num_experts(),
        routing="grouped_sigmoid",
        has_ends_everywhere=False,
    )


def _minimax_m2(fields: ConfigFields) -> Parts:
    heads, kv_heads, head = _heads(fields)
    qk_norms = (heads + kv_heads) * head
    layers = _every_layer(fields)
    return Parts(
        (_attention(fields, more=qk_norms),) * len(layers),
        layers,
        fields.integer("intermediate_size"),
        router_biases=fields.num_experts(),
        routing="other",
        has_ends_everywhere=False,
    )


def _gpt_oss(fields: ConfigFields) -> Parts:
    heads, _, _ = _heads(fields)
    bias = fields.flag("attention_bias", default=True)
    full = _attention(fields, bias=bias, more=heads)  # a sink per head
    kinds = fields.layer_kinds(
        lambda layer: "full_attention" if layer % 2 else "sliding_attention"
    )
    sliding = full
    if "sliding_attention" in kinds:
        window = KvShape(0, full.kv.per_token, fields.integer("sliding_window"))
        sliding = replace(full, kv=window)
    return Parts(
        tuple(sliding if kind == "sliding_attention" else full for kind in kinds),
        tuple(range(len(kinds))),
        fields.integer("intermediate_size"),
        router_biases=fields.num_experts(),
        has_expert_biases=True,
        activation="swigluoai",
    )


MODEL_TYPES: dict[str, Callable[[ConfigFields], Parts]] = {
    "mixtral": _mixtral,
    "phimoe": _phimoe,
    "olmoe": _olmoe,
    "qwen3_moe": _qwen3_moe,
    "qwen3_next": _qwen3_next,
    "qwen3_5_moe": _qwen3_5_moe,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek_v3,
    "kimi_k2": _deepseek_v3,
    "glm4_moe": _glm4_moe,
    "minimax_m2": _minimax_m2,
    "gpt_oss": _gpt_oss,
}
"""Architectures whose parameters are counted here."""
