"""A model's shape: parameters, experts and KV cache; and the formats experts come in."""

from __future__ import annotations

from dataclasses import dataclass

SERVED_BYTES = 2
"""Of one parameter or KV element as served: bfloat16 or float16 (vLLM casts float32 down)."""


class ShapeError(ValueError):
    """A config.json or checkpoint cannot be understood; the message says what and where."""


@dataclass(frozen=True, slots=True)
class KvShape:
    """What requests take in the KV cache, in elements.

    Attributes:
        per_token: of layers that attend to everything, for every token.
        window_per_token: of sliding-window layers, for tokens within their window.
        window_tokens: their window.
        state_per_request: of linear-attention layers, whatever the request's length.
    """

    per_token: int
    window_per_token: int = 0
    window_tokens: int = 0
    state_per_request: int = 0

    @property
    def bytes_per_token(self) -> int:
        """Bytes that each further token of a long request takes."""
        return self.per_token * SERVED_BYTES

    def bytes_per_request(self, batch_tokens: int) -> int:
        """Bytes that a request takes beside them at most.

        Args:
            batch_tokens: that vLLM computes in one step; a window slides on after the step.
        """
        window = self.window_per_token * (self.window_tokens + batch_tokens)
        has_window = self.window_tokens > 0
        return SERVED_BYTES * (self.state_per_request + (window if has_window else 0))


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a Mixture-of-Experts model.

    Attributes:
        model_type: of the config.json, such as ``mixtral``.
        quantization: quantisation method of the checkpoint; None without.
        num_layers: decoder layers.
        moe_layers: indices of those with routed experts.
        num_experts: routed experts per MoE layer.
        top_k: experts per token.
        expert_weights: elements of one expert's matrices, which quantisation packs.
        expert_biases: elements of one expert's biases, which it does not.
        dense_parameters: everything else: attention, embeddings, routers, shared experts.
        lookup_parameters: of those, input embeddings: one row is read per token.
        kv: KV cache.
        max_tokens: longest request the model is made for.
        extra_expert_layers: decoder layers behind the last one (multi-token prediction) whose
            experts are in the checkpoint and not served.
    """

    model_type: str
    quantization: str | None
    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    expert_weights: int
    expert_biases: int
    dense_parameters: int
    lookup_parameters: int
    kv: KvShape
    max_tokens: int
    extra_expert_layers: tuple[int, ...] = ()

    @property
    def total_experts(self) -> int:
        """Routed experts of all layers."""
        return len(self.moe_layers) * self.num_experts

    @property
    def parameters(self) -> int:
        """Parameters as served."""
        return self.dense_parameters + self.total_experts * (
            self.expert_weights + self.expert_biases
        )

    @property
    def dense_bytes(self) -> int:
        """Bytes of everything but routed experts, as served."""
        return self.dense_parameters * SERVED_BYTES

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert, as served."""
        return (self.expert_weights + self.expert_biases) * SERVED_BYTES


@dataclass(frozen=True, slots=True)
class ExpertFormat:
    """How experts may be stored.

    Attributes:
        name: short.
        weight_bits: bits of one weight.
        scale_bytes, weights_per_scale: of the scales beside them; 0 and 1 without.
        description: says the same in words.
    """

    name: str
    weight_bits: int
    scale_bytes: int
    weights_per_scale: int
    description: str

    def expert_bytes(self, shape: ModelShape) -> int:
        """Bytes of one expert of a model."""
        scales = -(-shape.expert_weights // self.weights_per_scale)
        packed = shape.expert_weights * self.weight_bits // 8
        return packed + scales * self.scale_bytes + shape.expert_biases * SERVED_BYTES


FORMATS = (
    ExpertFormat("bf16", 16, 0, 1, "2 bytes a weight; fp16 alike"),
    ExpertFormat("fp8", 8, 4, 128 * 128, "1 byte, a float32 scale for 128 x 128"),
    ExpertFormat("4-bit", 4, 1, 32, "half a byte, a 1-byte scale for 32 (MXFP4)"),
)
"""bf16 is served; the others are what a checkpoint may be in."""
