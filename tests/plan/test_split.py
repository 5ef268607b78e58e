"""Shares of ranks: they add up to the model, and what cannot be shared is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vllm_moe_offload.plan.shapes import ModelShape, known_models, shape_of_config
from vllm_moe_offload.plan.split import (
    Split,
    local_experts,
    misfits,
    rank_shape,
    stage_layers,
)

SHAPES = {
    name: shape_of_config(model.config, model.source) for name, model in known_models().items()
}
MIXTRAL = SHAPES["Mixtral-8x7B"]
DEEPSEEK = SHAPES["DeepSeek-V3"]

splits = st.builds(
    Split,
    nodes=st.just(1),
    tensor_parallel=st.sampled_from([1, 2, 4, 8, 16]),
    pipeline_parallel=st.integers(1, 9),
    has_expert_parallel=st.booleans(),
)


def shares(shape: ModelShape, split: Split) -> list[ModelShape]:
    return [rank_shape(shape, split, rank) for rank in range(split.num_ranks)]


@given(layers=st.integers(1, 100), stages=st.integers(1, 30))
def test_stages_have_all_layers_in_order(layers, stages):
    assume(stages <= layers)
    spans = [stage_layers(layers, stage, stages) for stage in range(stages)]
    assert [layer for span in spans for layer in span] == list(range(layers))
    assert max(map(len, spans)) - min(map(len, spans)) <= 1


@given(experts=st.integers(1, 300), ranks=st.integers(1, 70))
def test_ranks_have_all_experts(experts, ranks):
    counts = [local_experts(experts, rank, ranks) for rank in range(ranks)]
    assert sum(counts) == experts
    assert counts == sorted(counts, reverse=True)
    assert counts[0] - counts[-1] <= 1


@given(name=st.sampled_from(sorted(SHAPES)), split=splits)
def test_shares_add_up_to_the_model(name, split):
    shape = SHAPES[name]
    assume(not any(misfits(split, shape)))
    ranks = shares(shape, split)
    weights = sum(rank.total_experts * rank.expert.weights for rank in ranks)
    assert weights == shape.total_experts * shape.expert.weights
    dense = sum(rank.dense_bytes for rank in ranks)
    assert dense >= shape.dense_bytes
    for rank in ranks:
        assert rank.dense_bytes < shape.dense_bytes or split.num_ranks == 1
        assert 0 <= rank.lookup_bytes < rank.dense_bytes
        assert 1 <= rank.top_k <= rank.num_experts
    for stage in range(split.pipeline_parallel):
        same = [ranks[rank] for rank in split.ranks_of_stage(stage)]
        assert len({rank.moe_layers for rank in same}) == 1
        assert len({rank.kv for rank in same}) == 1


def test_one_rank_has_the_model():
    for shape in SHAPES.values():
        assert shares(shape, Split()) == [shape]


def test_tensor_parallel_ranks_have_a_slice_of_everything():
    (first, second) = shares(MIXTRAL, Split(tensor_parallel=2))
    assert first == second
    assert (first.num_experts, first.expert.width) == (8, 7168)
    assert first.kv.per_token == MIXTRAL.kv.per_token // 2
    whole = 32 * 2 * (4096 * 8 + 2 * 4096)  # routers and norms
    assert first.dense_bytes == pytest.approx((MIXTRAL.dense_bytes + whole) / 2, abs=100)


def test_expert_parallel_ranks_have_whole_experts():
    ranks = shares(
        replace(MIXTRAL, num_experts=10), Split(tensor_parallel=4, has_expert_parallel=True)
    )
    assert [rank.num_experts for rank in ranks] == [3, 3, 2, 2]
    assert {rank.expert for rank in ranks} == {MIXTRAL.expert}
    (*_, few) = shares(MIXTRAL, Split(tensor_parallel=8, has_expert_parallel=True))
    assert (few.num_experts, few.top_k) == (1, 1)


def test_stages_have_some_of_the_layers():
    stages = shares(DEEPSEEK, Split(pipeline_parallel=2))
    assert [len(stage.layers) for stage in stages] == [31, 30]
    assert [stage.moe_layers for stage in stages] == [
        tuple(range(3, 31)),
        tuple(range(31, 61)),
    ]
    assert stages[0].kv.per_token * 30 == stages[1].kv.per_token * 31
    # Of DeepSeek's, vLLM makes embeddings in the first stage and the output layer in the last.
    assert [bool(stage.ends.embedding_bytes) for stage in stages] == [True, False]
    assert [bool(stage.ends.head_bytes) for stage in stages] == [False, True]
    # Of Mixtral's, both in each; what a stage does not use it does not read.
    first, last = shares(MIXTRAL, Split(pipeline_parallel=2))
    assert first.dense_bytes == last.dense_bytes
    assert first.lookup_bytes == 2 * last.lookup_bytes == 2 * 32000 * 4096 * 2


def test_tied_embeddings_are_read_in_the_last_stage():
    config = known_models()["OLMoE-1B-7B"].config | {"tie_word_embeddings": True}
    first, last = shares(shape_of_config(config, "c"), Split(pipeline_parallel=2))
    assert (first.lookup_bytes, last.lookup_bytes) == (50304 * 2048 * 2, 0)


def test_a_latent_is_whole_on_every_rank_and_so_are_heads_beyond_their_number():
    assert {rank.kv for rank in shares(DEEPSEEK, Split(tensor_parallel=8))} == {DEEPSEEK.kv}
    qwen = SHAPES["Qwen3-30B-A3B"]  # 4 key-value heads
    four, eight = (rank_shape(qwen, Split(tensor_parallel=ranks), 0) for ranks in (4, 8))
    assert four.kv == eight.kv
    assert four.kv.per_token == qwen.kv.per_token // 4


def test_nodes_are_filled_one_after_the_other():
    split = Split(nodes=2, tensor_parallel=2, pipeline_parallel=2)
    assert [split.node(rank) for rank in range(4)] == [0, 0, 1, 1]
    assert [split.stage(rank) for rank in range(4)] == [0, 0, 1, 1]
    across = Split(nodes=2, tensor_parallel=4)
    assert [list(across.ranks_of_node(node)) for node in range(2)] == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("split", "name", "message"),
    [
        (
            Split(3, 2, 2),
            "Mixtral-8x7B",
            "--nodes=3: must divide the 4 ranks of --tensor-parallel-size=2 x "
            "--pipeline-parallel-size=2",
        ),
        (
            Split(1, 3),
            "Mixtral-8x7B",
            "--tensor-parallel-size=3: must divide the model's 32 attention heads",
        ),
        (
            Split(1, 28),
            "Qwen3-Next-80B-A3B",
            "--tensor-parallel-size=28: must divide the model's 16 attention heads",
        ),
        (
            Split(1, 16, 1, True),
            "Mixtral-8x7B",
            "--tensor-parallel-size=16 with --expert-parallel: must be at most the 8 experts of a "
            "layer",
        ),
        (
            Split(1, 1, 1, True),
            "Mixtral-8x7B",
            "--expert-parallel goes with --tensor-parallel-size of 2 or more, whose ranks share "
            "the experts of a layer",
        ),
        (
            Split(1, 1, 33),
            "Mixtral-8x7B",
            "--pipeline-parallel-size=33: must be at most the model's 32 layers",
        ),
        (
            Split(1, 1, 30),
            "DeepSeek-V3",
            "--pipeline-parallel-size=30: stage 0 would have layers 0 to 1, none with routed "
            "experts, which is not planned for",
        ),
    ],
)
def test_what_cannot_be_shared_is_named(split, name, message):
    assert next(misfits(split, SHAPES[name])) == message


def test_widths_and_key_value_heads_that_ranks_do_not_divide_are_named():
    odd = replace(MIXTRAL, expert=replace(MIXTRAL.expert, width=1001))
    assert list(misfits(Split(tensor_parallel=2), odd)) == [
        "--tensor-parallel-size=2: must divide the expert width 1001, or take whole experts with "
        "--expert-parallel"
    ]
    assert not list(misfits(Split(tensor_parallel=2, has_expert_parallel=True), odd))
    six = tuple(replace(layer, kv_heads=6) for layer in MIXTRAL.layers)
    assert list(misfits(Split(tensor_parallel=4), replace(MIXTRAL, layers=six))) == [
        "--tensor-parallel-size=4: must divide the model's 6 key-value heads, or be a multiple of "
        "them"
    ]
