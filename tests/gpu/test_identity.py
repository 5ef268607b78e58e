"""Offloaded output on a GPU is fully resident vLLM's: same tokens, bitwise the same logprobs.

Both run vLLM's Triton experts. As in ``tests/integration/test_identity.py``, a test runs the
plain engine and the offloaded ones of an architecture in one process.
"""

import pytest

from tests.integration.conftest import (  # noqa: F401  (fixtures)
    EXPERTS,
    LAYERS,
    demo_model,
    engine,
    run_engines,
    store_dir,
)
from tests.integration.test_identity import assert_identical, num_experts, offload, one_layer

pytestmark = [pytest.mark.gpu, pytest.mark.vllm]

GRAPHS = [None, "PIECEWISE", "FULL", "FULL_AND_PIECEWISE"]


def on_gpu(model, *, graphs=None, offload=None, **extra):
    """Same kernels for all; half a GPU, so that a machine may run something else, too."""
    if graphs is not None:
        extra["compilation_config"] = {"cudagraph_mode": graphs}
    return engine(
        model,
        eager=graphs is None,
        offload=offload,
        dtype="bfloat16",
        moe_backend="triton",
        gpu_memory_utilization=0.5,
        **extra,
    )


@pytest.mark.parametrize("graphs", GRAPHS, ids=str)
@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe"])
def test_half_capacity_and_one_layer(arch, graphs, demo_model, store_dir, run_engines):  # noqa: F811
    model = demo_model(arch)
    sizes = {"50%": num_experts(arch) // 2, one_layer(arch): EXPERTS}
    jobs = [on_gpu(model, graphs=graphs)]
    jobs += [on_gpu(model, graphs=graphs, offload=offload(store_dir, size)) for size in sizes]
    results = run_engines(jobs)
    assert_identical(results, list(sizes.values()))
    assert all(result["facts"]["misses"] > 0 for result in results[1:])


@pytest.mark.parametrize("graphs", GRAPHS, ids=str)
def test_grouped_router_and_shared_experts(graphs, demo_model, store_dir, run_engines):  # noqa: F811
    model = demo_model("deepseek_v2")
    jobs = [
        on_gpu(model, graphs=graphs),
        on_gpu(model, graphs=graphs, offload=offload(store_dir, "50%")),
    ]
    assert_identical(run_engines(jobs), [num_experts("deepseek_v2") // 2])


@pytest.mark.parametrize("mode", ["lru", "lru-layer", "lfu", "lrfu"])
def test_every_mode(mode, demo_model, store_dir, run_engines):  # noqa: F811
    model = demo_model("mixtral")
    jobs = [
        on_gpu(model),
        on_gpu(model, offload=offload(store_dir, "50%", mode, verify=True)),
    ]
    assert_identical(run_engines(jobs), [num_experts("mixtral") // 2])


def test_host_memory_smaller_than_the_experts(demo_model, store_dir, run_engines):  # noqa: F811
    model = demo_model("mixtral")
    rows = num_experts("mixtral") // 2
    jobs = [on_gpu(model)]
    jobs += [
        on_gpu(model, offload=offload(store_dir, "50%", host_gb=h)) for h in ("25%", "75%")
    ]
    assert_identical(run_engines(jobs), [rows, rows])


@pytest.mark.parametrize("graphs", GRAPHS, ids=str)
def test_everything_fits(graphs, demo_model, store_dir, run_engines):  # noqa: F811
    model = demo_model("qwen3_moe")
    jobs = [
        on_gpu(model, graphs=graphs),
        on_gpu(model, graphs=graphs, offload=offload(store_dir, "100%")),
    ]
    plain, offloaded = run_engines(jobs)
    assert "error" not in plain, plain
    assert "error" not in offloaded, offloaded
    assert sum(offloaded["facts"]["shape"]) == EXPERTS * LAYERS
    assert offloaded["batches"] == plain["batches"]


def test_dummy_weights_are_plain_vllms(demo_model, store_dir, run_engines):  # noqa: F811
    model = demo_model("mixtral")
    jobs = [
        on_gpu(model, load_format="dummy"),
        on_gpu(model, load_format="dummy", offload=offload(store_dir, "50%")),
    ]
    assert_identical(run_engines(jobs), [num_experts("mixtral") // 2])


def test_waves_equal_up_to_a_split_sum(demo_model, store_dir, run_engines):  # noqa: F811
    """Three rows for a layer of eight experts: prompts run in waves."""
    model = demo_model("mixtral")
    share = f"{100 * 3 / num_experts('mixtral'):.12f}%"
    plain, offloaded = run_engines(
        [on_gpu(model), on_gpu(model, offload=offload(store_dir, share, "lru"))]
    )
    assert "error" not in plain, plain
    assert "error" not in offloaded, offloaded
    for batch, expected in zip(offloaded["batches"], plain["batches"], strict=True):
        for output, reference in zip(batch, expected, strict=True):
            assert output["ids"][0] == reference["ids"][0]
            first, wanted = output["logprobs"][0], reference["logprobs"][0]
            for token in first.keys() & wanted.keys():
                difference = float.fromhex(first[token]) - float.fromhex(wanted[token])
                assert abs(difference) < 0.1
