"""A model's shape: parameters, experts and KV cache."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from dataclasses import dataclass

from vllm_moe_offload.plan.shapes.kernel_form import BF16, ExpertFormat, ExpertShape

SERVED_BYTES = 2
"""Of one parameter or KV element as served: bfloat16 or float16 (vLLM casts float32 down)."""


_values = reprlib.Repr()
_values.maxstring = 200
shown = _values.repr
"""How messages show a value of a file: with what it is, and not longer than a line."""


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

    @classmethod
    def total(cls, layers: Iterable[KvShape]) -> KvShape:
        """Of several layers together; those with a window have the same one."""
        layers = tuple(layers)
        return cls(
            sum(layer.per_token for layer in layers),
            sum(layer.window_per_token for layer in layers),
            max((layer.window_tokens for layer in layers), default=0),
            sum(layer.state_per_request for layer in layers),
        )


@dataclass(frozen=True, slots=True)
class LayerShape:
    """A decoder layer without its routed experts.

    Attributes:
        dense_bytes: attention, norms, router, shared experts or MLP, as served.
        whole_bytes: of these, what every tensor-parallel rank holds whole: norms, the router,
            projections to a latent.
        kv: what it takes in the KV cache.
        kv_heads: key-value heads, which tensor-parallel ranks share; 0: a latent, which each
            of them holds whole.
    """

    dense_bytes: int
    whole_bytes: int
    kv: KvShape
    kv_heads: int


@dataclass(frozen=True, slots=True)
class EndsShape:
    """What is in front of the decoder layers and behind them.

    Attributes:
        embedding_bytes: input embeddings.
        head_bytes: the output layer; 0 if it is the input embeddings.
        rest_bytes: the last norm, an encoder of images.
        in_every_stage: whether vLLM's code makes embeddings and output layer in all stages of a
            pipeline, used there or not; otherwise in the first and in the last.
    """

    embedding_bytes: int
    head_bytes: int
    rest_bytes: int
    in_every_stage: bool


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a Mixture-of-Experts model.

    Attributes:
        model_type: of the config.json, such as ``mixtral``.
        num_layers: decoder layers.
        moe_layers: indices of those with routed experts.
        num_experts: routed experts per MoE layer.
        top_k: experts per token.
        expert: one of them.
        format: what they are quantised to; None: to something that is not served.
        refusal: what that is, and what is served; empty if it is.
        dense_parameters: everything else: attention, embeddings, routers, shared experts.
        dense_bytes: of these, as served.
        lookup_parameters: of those, what a token does not read: input embeddings but for one row;
            of a rank also an output layer that it does not use.
        layers: the decoder layers, one by one.
        ends: what is before and behind them.
        attention_heads: of queries.
        max_tokens: longest request the model is made for.
        extra_expert_layers: decoder layers behind the last one (multi-token prediction) whose
            experts are in the checkpoint and not served.
    """

    model_type: str
    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    expert: ExpertShape
    format: ExpertFormat | None
    refusal: str
    dense_parameters: int
    dense_bytes: int
    lookup_parameters: int
    layers: tuple[LayerShape, ...]
    ends: EndsShape
    attention_heads: int
    max_tokens: int
    extra_expert_layers: tuple[int, ...] = ()

    @property
    def kv(self) -> KvShape:
        """KV cache of all layers."""
        return KvShape.total(layer.kv for layer in self.layers)

    @property
    def total_experts(self) -> int:
        """Routed experts of all layers."""
        return len(self.moe_layers) * self.num_experts

    @property
    def parameters(self) -> int:
        """Parameters as served."""
        return self.dense_parameters + self.total_experts * self.expert.parameters

    @property
    def lookup_bytes(self) -> int:
        """Bytes of the input embeddings, which no format quantises."""
        return self.lookup_parameters * SERVED_BYTES

    @property
    def is_quantized(self) -> bool:
        """Whether its experts are not what they were trained as."""
        return self.format != BF16
