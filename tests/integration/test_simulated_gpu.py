"""A GPU server's way of serving, on a CPU with a simulated copy engine: plain vLLM's output."""

import pytest

from tests.integration.conftest import engine
from tests.integration.test_identity import assert_identical, num_experts, offload, one_layer

pytestmark = pytest.mark.vllm


def on_gpu(host_share, model, **options):
    return {**engine(model, eager=True, **options), "simulated_gpu": host_share}


def test_half_capacity_and_one_layer(demo_model, store_dir, share_engines):
    """Features: a GPU server's way, with all experts in host memory and with some; qwen3_moe."""
    model = demo_model("qwen3_moe")
    total = num_experts("qwen3_moe")
    half, layer = offload(store_dir, "50%"), offload(store_dir, one_layer("qwen3_moe"))
    jobs = [
        engine(model, eager=True),
        on_gpu(1.0, model, offload=half),
        on_gpu(0.5, model, offload=layer),
    ]
    results = share_engines(jobs)
    assert_identical(results, [total // 2, total // 3])
    assert all(result["facts"]["misses"] > 0 for result in results[1:])


@pytest.mark.slow
def test_shared_experts(demo_model, store_dir, share_engines):
    model = demo_model("deepseek_v2")
    plain, half = share_engines(
        [
            engine(model, eager=True),
            on_gpu(0.25, model, offload=offload(store_dir, "50%")),
        ]
    )
    assert_identical([plain, half], [num_experts("deepseek_v2") // 2])


@pytest.mark.slow
def test_waves(demo_model, store_dir, share_engines):
    model = demo_model("mixtral")
    share = f"{100 * 3 / num_experts('mixtral'):.12f}%"
    waves = offload(store_dir, share, "lru")
    on_cpu, simulated = share_engines(
        [engine(model, eager=True, offload=waves), on_gpu(0.5, model, offload=waves)]
    )
    assert "error" not in on_cpu, on_cpu
    assert "error" not in simulated, simulated
    assert simulated["batches"] == on_cpu["batches"]  # the same waves, the same sums
