"""How ranks share a model, and nodes share ranks: vLLM's rules, restated without importing it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from vllm_moe_offload.plan.shapes.base import (
    SERVED_BYTES,
    EndsShape,
    KvShape,
    LayerShape,
    ModelShape,
)


def stage_layers(num_layers: int, stage: int, num_stages: int) -> range:
    """Decoder layers of a pipeline's stage.

    ``get_pp_indices`` in vllm/distributed/utils.py: layers left over go to the stages before the
    last one, and to the first one last of all.
    """
    share, left = divmod(num_layers, num_stages)
    counts = [share] * num_stages
    for place in range(2, left + 2):
        counts[-place] += 1
    start = sum(counts[:stage])
    return range(start, start + counts[stage])


def local_experts(num_experts: int, rank: int, num_ranks: int) -> int:
    """Experts of a layer that an expert-parallel rank holds, whatever their placement.

    ``determine_expert_map`` in vllm/model_executor/layers/fused_moe/expert_map_manager.py: the first
    ranks hold one more.
    """
    share, left = divmod(num_experts, num_ranks)
    return share + (rank < left)


@dataclass(frozen=True, slots=True)
class Split:
    """Options that make several ranks of one server, and on how many nodes.

    Attributes:
        nodes: machines, with as many ranks on each.
        tensor_parallel: ranks that share each layer.
        pipeline_parallel: stages that share the layers.
        has_expert_parallel: whether ranks that share a layer have whole experts of it, instead
            of a slice of each.
    """

    nodes: int = 1
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    has_expert_parallel: bool = False

    @property
    def num_ranks(self) -> int:
        """Of the server."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def ranks_per_node(self) -> int:
        """The same on each."""
        return self.num_ranks // self.nodes

    @property
    def expert_ranks(self) -> int:
        """That share a layer's experts, whole ones; 1: each has all of them, or a slice of all."""
        return self.tensor_parallel if self.has_expert_parallel else 1

    @property
    def expert_slices(self) -> int:
        """In how many slices an expert is."""
        return 1 if self.has_expert_parallel else self.tensor_parallel

    def stage(self, rank: int) -> int:
        """Of a rank: ranks that share a layer follow each other."""
        return rank // self.tensor_parallel

    def node(self, rank: int) -> int:
        """Of a rank: one node is full before the next."""
        return rank // self.ranks_per_node

    def ranks_of_stage(self, stage: int) -> range:
        """That share its layers."""
        return range(stage * self.tensor_parallel, (stage + 1) * self.tensor_parallel)

    def ranks_of_node(self, node: int) -> range:
        """That run there."""
        return range(node * self.ranks_per_node, (node + 1) * self.ranks_per_node)


def misfits(split: Split, shape: ModelShape) -> Iterator[str]:
    """Why a model cannot be shared like that, a line each that names an option; nothing if it can."""
    tensor, stages = split.tensor_parallel, split.pipeline_parallel
    if split.num_ranks % split.nodes:
        yield (
            f"--nodes={split.nodes}: must divide the {split.num_ranks} ranks of "
            f"--tensor-parallel-size={tensor} x --pipeline-parallel-size={stages}"
        )
    if shape.attention_heads % tensor:
        yield (
            f"--tensor-parallel-size={tensor}: must divide the model's "
            f"{shape.attention_heads} attention heads"
        )
    for heads in {layer.kv_heads for layer in shape.layers if layer.kv_heads}:
        if heads % tensor and tensor % heads:
            yield (
                f"--tensor-parallel-size={tensor}: must divide the model's {heads} key-value "
                "heads, or be a multiple of them"
            )
    yield from _experts_misfits(split, shape)
    yield from _stage_misfits(split, shape)


def _experts_misfits(split: Split, shape: ModelShape) -> Iterator[str]:
    tensor = split.tensor_parallel
    if split.has_expert_parallel and tensor == 1:
        yield (
            "--expert-parallel goes with --tensor-parallel-size of 2 or more, whose ranks share "
            "the experts of a layer"
        )
    if split.expert_ranks > shape.num_experts:
        yield (
            f"--tensor-parallel-size={tensor} with --expert-parallel: must be at most the "
            f"{shape.num_experts} experts of a layer"
        )
    if shape.expert.width % split.expert_slices:
        yield (
            f"--tensor-parallel-size={tensor}: must divide the expert width "
            f"{shape.expert.width}, or take whole experts with --expert-parallel"
        )


def _stage_misfits(split: Split, shape: ModelShape) -> Iterator[str]:
    stages = split.pipeline_parallel
    if stages > shape.num_layers:
        yield (
            f"--pipeline-parallel-size={stages}: must be at most the model's "
            f"{shape.num_layers} layers"
        )
        return
    for stage in range(stages):
        layers = stage_layers(shape.num_layers, stage, stages)
        if not any(layer in layers for layer in shape.moe_layers):
            yield (
                f"--pipeline-parallel-size={stages}: stage {stage} would have layers {layers[0]} "
                f"to {layers[-1]}, none with routed experts, which is not planned for"
            )


def rank_shape(
    shape: ModelShape, split: Split, rank: int, layers_of_stage: range | None = None
) -> ModelShape:
    """What one rank has of a model, as a model of its own.

    Args:
        shape: the whole model, which :func:`misfits` has nothing against.
        split: how it is shared.
        rank: of the server, from 0.
        layers_of_stage: decoder layers of its stage; None: by :func:`stage_layers`.
    """
    if split.num_ranks == 1:
        return shape
    stage = split.stage(rank)
    span = layers_of_stage
    if span is None:
        span = stage_layers(shape.num_layers, stage, split.pipeline_parallel)
    layers = tuple(_slice(shape.layers[layer], split.tensor_parallel) for layer in span)
    ends = _slice_ends(shape.ends, split, stage)
    experts = local_experts(shape.num_experts, rank % split.expert_ranks, split.expert_ranks)
    dense_bytes = (
        sum(layer.dense_bytes for layer in layers)
        + ends.embedding_bytes
        + ends.head_bytes
        + ends.rest_bytes
    )
    return replace(
        shape,
        num_layers=len(span),
        moe_layers=tuple(layer for layer in shape.moe_layers if layer in span),
        num_experts=experts,
        top_k=min(shape.top_k, experts),
        expert=replace(shape.expert, width=shape.expert.width // split.expert_slices),
        dense_parameters=shape.dense_parameters * dense_bytes // shape.dense_bytes,
        dense_bytes=dense_bytes,
        lookup_parameters=_unread_bytes(shape, split, stage, ends) // SERVED_BYTES,
        layers=layers,
        ends=ends,
        attention_heads=shape.attention_heads // split.tensor_parallel,
    )


def _slice(layer: LayerShape, ranks: int) -> LayerShape:
    """A layer's share of one of ``ranks`` tensor-parallel ranks."""
    split_bytes = layer.dense_bytes - layer.whole_bytes
    kv, heads = layer.kv, layer.kv_heads
    if heads:
        own = max(1, heads // ranks)
        kv = KvShape(
            kv.per_token * own // heads,
            kv.window_per_token * own // heads,
            kv.window_tokens,
            kv.state_per_request * own // heads,
        )
        heads = own
    return replace(
        layer, dense_bytes=layer.whole_bytes + -(-split_bytes // ranks), kv=kv, kv_heads=heads
    )


def _slice_ends(ends: EndsShape, split: Split, stage: int) -> EndsShape:
    """What a rank of a stage has before and behind its layers.

    Output layers that are the input embeddings are in both ends. An encoder of images is taken
    to be in every stage.
    """
    ranks = split.tensor_parallel
    is_first, is_last = stage == 0, stage == split.pipeline_parallel - 1
    has_embedding = ends.in_every_stage or is_first or (is_last and not ends.head_bytes)
    has_head = ends.in_every_stage or is_last
    return replace(
        ends,
        embedding_bytes=-(-ends.embedding_bytes // ranks) if has_embedding else 0,
        head_bytes=-(-ends.head_bytes // ranks) if has_head else 0,
        rest_bytes=-(-ends.rest_bytes // ranks),
    )


def _unread_bytes(shape: ModelShape, split: Split, stage: int, ends: EndsShape) -> int:
    """What a token does not read of a rank's ends: embeddings, and an output layer that only the
    last stage uses."""
    is_last = stage == split.pipeline_parallel - 1
    if shape.ends.head_bytes:
        return ends.embedding_bytes + (0 if is_last else ends.head_bytes)
    return 0 if is_last else ends.embedding_bytes
