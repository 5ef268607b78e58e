"""vLLM's Triton experts on rows of a pool: bit for bit what they compute on the model's weights."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", exc_type=ModuleNotFoundError)

from vllm_moe_offload.integration import block_slots, patching, triton_slots
from vllm_moe_offload.integration.block_slots import SlotMap
from vllm_moe_offload.integration.device_calls import DeviceCalls
from vllm_moe_offload.integration.experts import OffloadedExperts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 64, 4, 256, 128
ROWS = 1500
"""More than a map for E experts reaches, and than vLLM's alignment counts (1024)."""


@pytest.fixture(scope="module", autouse=True)
def patched():
    from vllm.model_executor.layers.fused_moe.experts import triton_moe

    patching.wrap(
        triton_moe, "_prepare_expert_assignment", triton_slots.prepare_expert_assignment
    )


def triton_experts(dtype):
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FUSED_MOE_UNQUANTIZED_CONFIG,
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    config = FusedMoEConfig(
        num_experts=EXPERTS,
        experts_per_token=TOP_K,
        hidden_dim=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_local_experts=EXPERTS,
        num_logical_experts=EXPERTS,
        activation=MoEActivation.SILU,
        device="cuda",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=dtype,
    )
    return TritonExperts(config, FUSED_MOE_UNQUANTIZED_CONFIG)


class Layer:
    """What ``apply_on_slots`` needs of a RoutedExperts."""

    local_num_experts = EXPERTS

    def __init__(self, experts, w13, w2):
        self.w13_weight, self.w2_weight = w13, w2
        self._experts = experts
        self.quant_method = SimpleNamespace(
            moe_kernel=SimpleNamespace(fused_experts=experts), apply=self.apply
        )

    def apply(self, *, layer, x, topk_weights, topk_ids, **_):
        tokens = x.shape[0]
        out = torch.empty_like(x)
        shapes = self._experts.workspace_shapes(
            tokens,
            2 * INTERMEDIATE,
            HIDDEN,
            TOP_K,
            EXPERTS,
            EXPERTS,
            None,
            self._experts.moe_config.activation,
        )
        first, second = (
            torch.empty(shape, dtype=x.dtype, device=x.device) for shape in shapes[:2]
        )
        self._experts.apply(
            output=out,
            hidden_states=x,
            w1=layer.w13_weight,
            w2=layer.w2_weight,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=self._experts.moe_config.activation,
            global_num_experts=EXPERTS,
            expert_map=None,
            a1q_scale=None,
            a2_scale=None,
            workspace13=first,
            workspace2=second,
            expert_tokens_meta=None,
            apply_router_weight_on_input=False,
        )
        return out


def layers(dtype):
    """The same experts: in logical order, and anywhere in a pool of NaN."""
    torch.manual_seed(0)
    w13 = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, dtype=dtype, device="cuda") / 16
    w2 = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, dtype=dtype, device="cuda") / 16
    places = torch.randperm(ROWS, device="cuda")[:EXPERTS]
    pool = []
    for weight in (w13, w2):
        rows = torch.full((ROWS, *weight.shape[1:]), float("nan"), dtype=dtype, device="cuda")
        rows[places] = weight
        pool.append(rows)
    experts = triton_experts(dtype)
    slot_map = torch.full((EXPERTS + 1,), -1, dtype=torch.int32, device="cuda")
    slot_map[:-1] = places
    return Layer(experts, w13, w2), Layer(experts, *pool), slot_map


def a_call(tokens, dtype):
    x = torch.randn(tokens, HIDDEN, dtype=dtype, device="cuda")
    weights, ids = torch.rand(tokens, EXPERTS, device="cuda").topk(TOP_K)
    return x, weights.float(), ids.int()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 33, 512, 4096])
def test_bit_equal_to_the_models_own_weights(tokens, dtype):
    plain, pooled, slot_map = layers(dtype)
    x, weights, ids = a_call(tokens, dtype)
    expected = block_slots.apply(plain, x, weights, ids)
    assert bool(torch.isfinite(expected).all())
    found = triton_slots.apply_on_slots(pooled, x, weights, ids, SlotMap(EXPERTS, slot_map))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("tokens", [1, 33])
def test_absent_experts_are_zeros_and_are_not_read(tokens):
    plain, pooled, slot_map = layers(torch.bfloat16)
    x, weights, ids = a_call(tokens, torch.bfloat16)
    total = torch.zeros_like(x, dtype=torch.float32)
    for wave in range(4):
        absent = slot_map.clone()
        absent[:-1][torch.arange(EXPERTS, device="cuda") % 4 != wave] = -1
        wave_map = SlotMap(EXPERTS, absent, is_wave=True)
        total += triton_slots.apply_on_slots(pooled, x, weights, ids, wave_map)
    expected = block_slots.apply(plain, x, weights, ids).float()
    torch.testing.assert_close(total, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("tokens", [2, 4, 33, 512])
def test_padding_reads_no_record(tokens):
    """Rows whose ids are -1, as VLLM_MOE_SKIP_PADDING has them; the last expert is absent."""
    _, pooled, slot_map = layers(torch.bfloat16)
    x, weights, ids = a_call(tokens, torch.bfloat16)
    real = tokens - 1
    ids[:real] = torch.where(ids[:real] == EXPERTS - 1, 0, ids[:real])
    ids[real:] = -1
    slot_map[EXPERTS - 1] = int(torch.randint(ROWS, ()))  # NaN, or another expert
    found = triton_slots.apply_on_slots(pooled, x, weights, ids, SlotMap(EXPERTS, slot_map))
    assert bool(torch.isfinite(found[:real]).all())
    if tokens * TOP_K * 4 <= EXPERTS:  # not aligned: every row is written
        assert not bool(found[real:].any())


def test_rows_that_change_later_do_not_reach_a_queued_kernel():
    """A slot map is uploaded in stream order: maps of later calls overtake nothing."""
    plain, pooled, slot_map = layers(torch.bfloat16)
    x, weights, ids = a_call(33, torch.bfloat16)
    expected = block_slots.apply(plain, x, weights, ids)
    slots = slot_map[:-1].cpu().numpy()
    cache = SimpleNamespace(experts=torch.arange(EXPERTS).numpy(), slots=slots)
    runtime = SimpleNamespace(cache=cache)
    calls = DeviceCalls(runtime, torch.device("cuda", 0), EXPERTS, triton_slots.apply_on_slots)
    results = []
    for _ in range(50):
        results.append(
            triton_slots.apply_on_slots(pooled, x, weights, ids, calls._upload_plan())
        )
        cache.slots = torch.zeros(EXPERTS, dtype=torch.int32).numpy()
        calls._upload_plan()
        cache.slots = slots
    assert all(torch.equal(result, expected) for result in results)


def test_expert_parameters_take_no_device_memory():
    class Dense(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w13_weight = torch.nn.Parameter(torch.empty(64, 1 << 20))

    class Experts(OffloadedExperts, Dense):
        pass

    before = torch.cuda.memory_allocated()
    with torch.device("cuda"):
        experts = Experts()
    assert torch.cuda.memory_allocated() == before
    # A parameter's data may move to the device, as startup.py and vLLM's own loader do.
    experts.w13_weight.data = torch.zeros(3, 4, device="cuda")
    assert experts.w13_weight.device.type == "cuda"
