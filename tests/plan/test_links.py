"""Bounds of several ranks: by hand, by drawing every set, and as one rank has them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_offload.config import GIB
from vllm_moe_offload.plan.cluster import fit_cluster
from vllm_moe_offload.plan.fit import HIT_RATES, fit
from vllm_moe_offload.plan.links import SharedBound, expected_most, expected_most_missed
from vllm_moe_offload.plan.machine import Machine
from vllm_moe_offload.plan.shapes import known_models, shape_of_config
from vllm_moe_offload.plan.split import Split

SHAPES = {
    name: shape_of_config(model.config, model.source) for name, model in known_models().items()
}
MIXTRAL = SHAPES["Mixtral-8x7B"]
RECORD = 352_321_536

CPU = Machine(200 * GIB, None, link_gbps=10.0, disk_gbps=10.0)
GPU = Machine(2000 * GIB, 40 * GIB, link_gbps=25.0, disk_gbps=7.0)


def bound(split: Split, machine: Machine = CPU, hit_rate: float = 0.5) -> SharedBound:
    return fit_cluster(MIXTRAL, machine, split, 4096).bound(hit_rate)


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), data=st.data())
def test_the_expected_most_is_the_mean_over_all_sets(sizes, data):
    drawn = data.draw(st.integers(0, sum(sizes)))
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    most = [
        max((chosen.count(group) for group in set(chosen)), default=0)
        for chosen in itertools.combinations(groups, drawn)
    ]
    assert expected_most(tuple(sizes), drawn) == pytest.approx(fmean(most))


@given(
    sizes=st.lists(st.integers(2, 64), min_size=1, max_size=8),
    used=st.integers(1, 8),
    hit_rate=st.sampled_from(HIT_RATES),
)
def test_misses_of_the_slowest_lie_between_an_even_share_and_all(sizes, used, hit_rate):
    used = min(used, sum(sizes))
    missed = (1 - hit_rate) * used
    most = expected_most_missed(tuple(sizes), used, hit_rate)
    assert missed / len(sizes) <= most + 1e-9
    assert most <= missed + 1e-9
    if len(sizes) == 1:
        assert most == pytest.approx(missed)


@pytest.mark.parametrize("memory_gbps", [None, 100.0])
@pytest.mark.parametrize("machine", [CPU, GPU, replace(GPU, host_bytes=64 * GIB)], ids=str)
@pytest.mark.parametrize("name", ["Mixtral-8x7B", "Qwen3-Next-80B-A3B"])
def test_one_rank_is_bound_as_a_server_of_its_own(name, machine, memory_gbps):
    machine = replace(machine, memory_gbps=memory_gbps)
    alone = fit(SHAPES[name], machine, 4096)
    shared = fit_cluster(SHAPES[name], machine, Split(), 4096)
    for hit_rate in (*HIT_RATES, 1.0):
        one, all_ranks = alone.bound(hit_rate), shared.bound(hit_rate)
        assert all_ranks.tokens_per_s == pytest.approx(one.tokens_per_s)
        assert all_ranks.slowest_bytes_per_token == pytest.approx(one.read_bytes_per_token)
        assert all_ranks.read_bytes_per_token == pytest.approx(one.read_bytes_per_token)


def test_slices_are_read_by_the_disks_of_all_nodes():
    two, across = bound(Split(1, 2)), bound(Split(2, 2))
    assert two.read_bytes_per_token == across.read_bytes_per_token == 32 * RECORD
    assert two.slowest_bytes_per_token == 32 * RECORD  # one disk for both
    assert across.slowest_bytes_per_token == 16 * RECORD
    assert across.tokens_per_s == pytest.approx(10e9 / (16 * RECORD))


def test_gpus_on_one_node_have_links_of_their_own_and_one_disk():
    scarce = replace(GPU, host_bytes=64 * GIB)
    (own, other) = fit_cluster(MIXTRAL, scarce, Split(1, 2), 4096).fits
    assert own == other
    from_disk = 1 - (scarce.host_bytes * 0.92 / 2 - 4 * GIB) / (42 * GIB)
    assert own.host_share == pytest.approx(1 - from_disk)
    seconds = 16 * RECORD / 25e9 + 32 * RECORD * from_disk / 7e9
    assert bound(Split(1, 2), scarce).tokens_per_s == pytest.approx(1 / seconds)
    assert bound(Split(2, 2), GPU).tokens_per_s == pytest.approx(25e9 / (16 * RECORD))


def test_the_rank_with_most_of_the_experts_decides():
    # Of 2 of 8 experts, both are on one of 2 nodes in 12 of 28 sets.
    most = 1 + 12 / 28
    none_cached = bound(Split(2, 2, 1, True), hit_rate=0.0)
    assert none_cached.read_bytes_per_token == 64 * RECORD
    assert none_cached.slowest_bytes_per_token == pytest.approx(32 * most * RECORD)
    # At a hit rate of a half: both missed in a quarter, one in a half of all cases.
    half = bound(Split(2, 2, 1, True))
    assert half.slowest_bytes_per_token == pytest.approx(32 * (most / 4 + 1 / 2) * RECORD)
    # On one node they share the disk, whoever has the expert.
    assert bound(Split(1, 2, 1, True)).slowest_bytes_per_token == pytest.approx(32 * RECORD)


def test_stages_wait_for_each_other():
    for split in (Split(1, 1, 2), Split(2, 1, 2)):
        assert bound(split).tokens_per_s == pytest.approx(bound(Split()).tokens_per_s)


def test_reading_the_weights_takes_the_ranks_of_a_memory_together():
    machine = replace(CPU, memory_gbps=50.0)
    dense = MIXTRAL.dense_bytes - 32000 * 4096 * 2
    whole = 32 * 2 * (4096 * 8 + 2 * 4096) + 4096 * 2  # routers and norms, on each rank
    used = 64 * RECORD
    one_node = bound(Split(1, 2), machine, 1.0).tokens_per_s
    assert 1 / one_node == pytest.approx((dense + whole + used) / 50e9, rel=1e-3)
    two_nodes = bound(Split(2, 2), machine, 1.0).tokens_per_s
    assert two_nodes == pytest.approx(2 * one_node)
