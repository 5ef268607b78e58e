"""A GPU that plans its cache, on a CPU by its rule: plain vLLM's output, and figures that fit."""

import numpy as np
import pytest

from scripts.demo_model import write_demo_model
from tests.integration.conftest import EXPERTS, SHAPE, assert_recorded, engine
from tests.integration.test_identity import assert_identical, num_experts, offload, one_layer
from vllm_moe_offload.replay.one_pool import replay_one_pool_recorded
from vllm_moe_offload.trace.collection import ActivationCollection
from vllm_moe_offload.trace.routing import load_trace

pytestmark = pytest.mark.vllm


def on_device(model, late=1, **options):
    return {**engine(model, eager=True, **options), "simulated_device": late}


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory):
    """A quarter of its experts is more than a layer has."""
    directory = tmp_path_factory.mktemp("deep") / "qwen3_moe"
    write_demo_model(directory, "qwen3_moe", **{**SHAPE, "layers": 6})
    return directory


def test_half_a_quarter_and_one_layer(deep_model, store_dir, share_engines):
    """Features: a GPU that plans, at three capacities; qwen3_moe; logs late by none, one and two."""
    model, total = deep_model, 6 * EXPERTS
    sizes = {"50%": total // 2, "25%": total // 4, f"{100 / 6:.12f}%": EXPERTS}
    jobs = [engine(model, eager=True)]
    for late, size in enumerate(sizes):
        jobs.append(on_device(model, late, offload=offload(store_dir, size)))
    results = share_engines(jobs)
    assert_identical(results, list(sizes.values()))
    misses = [result["facts"]["misses"] for result in results[1:]]
    assert 0 < misses[0] < misses[1] < misses[2]


def test_all_experts_are_vllms_own_affair(demo_model, store_dir, share_engines, tmp_path):
    """Features: everything fits on a GPU; routing is seen where it is recorded, and nowhere else."""
    model, trace = demo_model("deepseek_v2"), tmp_path / "routing.npz"
    jobs = [
        engine(model, eager=True),
        on_device(model, offload=offload(store_dir, "100%")),
        on_device(model, offload=offload(store_dir, "100%", record_trace=str(trace))),
    ]
    plain, resident, recorded = share_engines(jobs)
    for result in (resident, recorded):
        assert "error" not in result, result
        assert result["batches"] == plain["batches"]
        assert result["facts"]["hits"] + result["facts"]["misses"] == 0
        assert result["facts"]["shape"] == [num_experts("deepseek_v2"), 0]
        assert result["facts"]["calls"] > 0
    assert_recorded(trace, prompts_of(jobs[2]), jobs[2]["max_tokens"])


def test_figures_matrices_and_trace_are_exact(demo_model, store_dir, share_engines, tmp_path):
    """Features: what a GPU that plans counts and records; grouped routers; preemption; mode trace."""
    model = demo_model("deepseek_v2")
    crowded = {"num_gpu_blocks_override": 24, "kv_cache_memory_bytes": None}
    kept = {name: str(tmp_path / f"{name}.msgpack") for name in ("device", "host")}
    traces = {name: str(tmp_path / f"{name}.npz") for name in ("device", "host")}
    jobs = [
        engine(model, eager=True, **crowded),
        on_device(
            model,
            2,
            offload=offload(
                store_dir, "50%", trace_path=kept["device"], record_trace=traces["device"]
            ),
            **crowded,
        ),
        engine(
            model,
            eager=True,
            offload=offload(
                store_dir, "50%", trace_path=kept["host"], record_trace=traces["host"]
            ),
            **crowded,
        ),
    ]
    results = share_engines(jobs)
    assert_identical(results, [num_experts("deepseek_v2") // 2] * 2)
    assert_recorded(traces["device"], prompts_of(jobs[1]), jobs[1]["max_tokens"])
    device, host = (load_trace(traces[name]) for name in ("device", "host"))
    assert np.array_equal(device.ids, host.ids)
    replayed = replay_one_pool_recorded(device, "lrfu")
    facts = results[1]["facts"]
    assert (facts["hits"], facts["misses"]) == (replayed.hits, replayed.misses)
    means = [np.sort(ActivationCollection.load(kept[name]).mean().reshape(-1)) for name in kept]
    assert np.array_equal(*means)
    assert means[0].any()


def test_waves(demo_model, store_dir, share_engines):
    """Features: a GPU that plans and has fewer slots than a layer has experts."""
    model = demo_model("mixtral")
    share = f"{100 * 3 / num_experts('mixtral'):.12f}%"
    on_cpu, simulated = share_engines(
        [
            engine(model, eager=True, offload=offload(store_dir, share, "lru")),
            on_device(model, offload=offload(store_dir, share, "lru")),
        ]
    )
    for result in (on_cpu, simulated):
        assert "error" not in result, result
    assert ids_of(simulated) == ids_of(on_cpu)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["mixtral", "olmoe", "gpt_oss", "deepseek_v2"])
def test_every_architecture(arch, demo_model, store_dir, share_engines):
    model, total = demo_model(arch), num_experts(arch)
    jobs = [engine(model, eager=True)]
    sizes = {"50%": total // 2, one_layer(arch): EXPERTS}
    jobs += [on_device(model, offload=offload(store_dir, size)) for size in sizes]
    assert_identical(share_engines(jobs), list(sizes.values()))


def ids_of(result):
    return [request["ids"] for batch in result["batches"] for request in batch]


def prompts_of(job):
    return [prompt for batch in job["batches"] for prompt in batch]
