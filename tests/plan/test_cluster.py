"""Several ranks: each within its memory, all with the same options, nodes with their sums."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.plan.test_fit import SHAPES, cpu, gpu, option
from tests.plan.test_split import splits
from vllm_moe_offload.cache.sizing import cache_shape, cache_slots
from vllm_moe_offload.config import GIB
from vllm_moe_offload.plan.cluster import fit_cluster
from vllm_moe_offload.plan.fit import fit
from vllm_moe_offload.plan.machine import HOST_RUNTIME_BYTES
from vllm_moe_offload.plan.shapes import refusals
from vllm_moe_offload.plan.split import Split, misfits
from vllm_moe_offload.plan.ways import Way
from vllm_moe_offload.policy import TracePolicy

MIXTRAL, DEEPSEEK = SHAPES["Mixtral-8x7B"], SHAPES["DeepSeek-V3"]


@given(
    name=st.sampled_from(sorted(SHAPES)),
    split=st.builds(replace, splits, nodes=st.sampled_from([1, 2, 4])),
    gib=st.floats(20, 900),
    has_gpu=st.booleans(),
    kv_tokens=st.none() | st.integers(1, 50_000),
)
def test_all_ranks_work_with_the_options_of_one_line(name, split, gib, has_gpu, kv_tokens):
    shape = SHAPES[name]
    assume(not any(misfits(split, shape)))
    cluster = fit_cluster(shape, gpu(gib / 4, 2000) if has_gpu else cpu(gib), split, kv_tokens)
    assume(not cluster.problems)
    cache_gb = option(cluster, "--moe-offload-config.cache_gb")
    kv_bytes = option(cluster, "--kv-cache-memory-bytes")
    for fitted in cluster.fits:
        own = fitted.shape
        used = own.dense_bytes + fitted.machine.runtime_bytes
        used += fitted.kv_bytes + fitted.cache_bytes
        assert used <= fitted.machine.fast_bytes + (1 << 21)  # cache_gb has three decimals
        sizes = {
            "num_layers": len(own.moe_layers),
            "num_experts": own.num_experts,
            "top_k": own.top_k,
        }
        slots = cache_slots(cache_gb, expert_bytes=fitted.expert_bytes, auto_bytes=0, **sizes)
        staged = cache_shape(slots, rules=TracePolicy.rules, **sizes)
        assert fitted.cache.num_pool_slots == staged.num_pool_slots
        assert fitted.cache == staged or fitted.way is Way.DEVICE
        assert fitted.kv_tokens >= (kv_tokens or min(2048, shape.max_tokens))
        assert has_gpu or fitted.kv_bytes <= int(kv_bytes)
    assert sum(need.store_bytes for need in cluster.nodes()) == sum(
        fitted.store_bytes for fitted in cluster.fits
    )
    assert sorted(rank for kind in cluster.kinds for rank in kind.ranks) == list(
        range(split.num_ranks)
    )


def test_one_rank_on_one_node_is_a_server_of_its_own():
    assert fit_cluster(MIXTRAL, cpu(64), Split()).fits == (fit(MIXTRAL, cpu(64)),)


def test_ranks_of_a_node_share_its_memory():
    one, two = (fit_cluster(MIXTRAL, cpu(64), Split(nodes, 2)).fits for nodes in (1, 2))
    assert one[0].machine.fast_bytes == two[0].machine.fast_bytes // 2
    assert two[0].cached_share > one[0].cached_share
    own, other = (fit_cluster(MIXTRAL, gpu(24, 64), Split(nodes, 2)).fits for nodes in (1, 2))
    assert own[0].machine.fast_bytes == other[0].machine.fast_bytes  # a GPU each
    assert own[0].host_share < other[0].host_share == 1


def test_nodes_need_what_their_ranks_need():
    cluster = fit_cluster(DEEPSEEK, cpu(900), Split(2, 4, 2, True))
    first, second = cluster.nodes()
    record_bytes = cluster.fits[0].layout.record_bytes
    # Layers 0 to 2 have no experts.
    assert first.store_bytes == 28 * 256 * record_bytes
    assert second.store_bytes == 30 * 256 * record_bytes
    assert (list(first.ranks), list(second.ranks)) == ([0, 1, 2, 3], [4, 5, 6, 7])
    for need in (first, second):
        assert need.host_bytes <= 900 * GIB * 0.92 + (1 << 23)
        assert need.build_bytes == 4 * cluster.fits[need.ranks[0]].build_bytes
    (node,) = fit_cluster(MIXTRAL, gpu(24, 200), Split(1, 2)).nodes()
    assert node.host_bytes == 84 * GIB + 2 * HOST_RUNTIME_BYTES


def test_ranks_that_need_the_same_are_one_kind():
    shape = replace(MIXTRAL, num_experts=10)
    cluster = fit_cluster(shape, cpu(400), Split(1, 4, 2, True))
    assert [kind.ranks for kind in cluster.kinds] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert [kind.fit.shape.num_experts for kind in cluster.kinds] == [3, 2, 3, 2]
    assert [kind.layers for kind in cluster.kinds] == [range(16)] * 2 + [range(16, 32)] * 2
    assert cluster.tightest.ranks == (0, 1)


def test_the_cache_of_the_rank_with_least_room_is_everyones():
    cluster = fit_cluster(DEEPSEEK, cpu(400), Split(2, 4, 2, True))
    first, second = (kind.fit for kind in cluster.kinds)
    assert first.cache_gb == second.cache_gb
    assert first.cache.num_slots == second.cache.num_slots
    assert first.kv_tokens == second.kv_tokens
    assert first.kv_bytes * 30 == second.kv_bytes * 31
    assert cluster.tightest.fit is second  # more layers with experts
    assert option(cluster, "--kv-cache-memory-bytes") == str(first.kv_bytes)


@pytest.mark.parametrize("has_gpu", [False, True])
@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("Mixtral-8x7B", Split(1, 2)),
        ("Mixtral-8x7B", Split(2, 2)),
        ("Mixtral-8x7B", Split(2, 2, 2, True)),
        ("Qwen3-30B-A3B", Split(1, 4, 3)),
        ("DeepSeek-V3", Split(2, 4, 2, True)),
    ],
    ids=str,
)
def test_with_the_least_memory_that_is_named_it_works_and_with_less_it_does_not(
    name, split, has_gpu
):
    shape = SHAPES[name]

    def problems(gib):
        machine = gpu(gib, 4000) if has_gpu else cpu(gib)
        return fit_cluster(shape, machine, split).problems

    found = problems(1)
    assert found
    least_gib = max(float(problem.remedy.split()[1].replace(",", "")) for problem in found)
    assert not problems(least_gib)
    assert problems(least_gib - 0.2 * split.ranks_per_node)


def test_problems_say_that_memory_is_shared():
    (first, second) = fit_cluster(MIXTRAL, cpu(4), Split(1, 2)).problems
    assert "1.84 GiB of fast memory (92% of --host-memory, for one of 2 ranks)" in first.text
    assert "1.84 GiB are there, for one of 2 ranks" in second.text
    (problem,) = fit_cluster(MIXTRAL, gpu(2, 400), Split(1, 2)).problems
    assert "(92% of --device-memory)" in problem.text  # each has one of its own


def test_of_ranks_with_different_needs_the_one_that_needs_most_is_named():
    cluster = fit_cluster(DEEPSEEK, cpu(20), Split(2, 4, 2, True))
    assert len({fitted.problems for fitted in cluster.fits}) == 2
    assert cluster.problems == cluster.fits[0].problems  # with embeddings and dense layers
    assert len(cluster.problems) == 2


def test_slices_that_a_kernel_does_not_take_are_named():
    fp8 = SHAPES["Qwen3-30B-A3B-FP8"]
    assert not any(refusals(fp8.format, "cpu", fp8.expert))
    (problem,) = fit_cluster(fp8, cpu(64), Split(1, 4)).problems
    assert problem.text == (
        "not served: fp8 experts on a CPU: expert width 192, must be a multiple of 128"
    )
    assert problem.remedy.startswith(
        "--expert-parallel (ranks have whole experts), another --tensor-parallel-size, or a "
        "checkpoint"
    )
    assert not fit_cluster(fp8, cpu(64), Split(1, 4, 1, True)).problems
    # Where whole experts are not served either, whole experts are no remedy.
    minimax = SHAPES["MiniMax-M2.7"]
    (problem,) = fit_cluster(minimax, cpu(900), Split(1, 2)).problems
    assert problem.remedy.startswith("a GPU, or a checkpoint")


def test_the_line_has_the_options_that_were_planned_with():
    options = fit_cluster(MIXTRAL, cpu(128), Split(2, 2, 2, True)).serve_options()
    assert options[-7:] == [
        "--tensor-parallel-size",
        "2",
        "--pipeline-parallel-size",
        "2",
        "--enable-expert-parallel",
        "--distributed-executor-backend",
        "ray",
    ]
    options = fit_cluster(MIXTRAL, cpu(128), Split(1, 2)).serve_options()
    assert options[-2:] == ["--tensor-parallel-size", "2"]
