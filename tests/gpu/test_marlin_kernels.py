"""vLLM's Marlin experts on slots of a pool: bit for bit what they compute on the model's weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("vllm", exc_type=ModuleNotFoundError)

from vllm_moe_offload.integration import marlin_slots
from vllm_moe_offload.integration.block_slots import SlotMap, on_slots

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, GROUP = 64, 4, 256, 128, 64
SLOTS = 1500
"""More than vLLM's alignment counts (1024)."""
KINDS = ("int4", "int4 with zero points", "mxfp4")
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def patched():
    marlin_slots.install()


def words(*shape: int) -> torch.Tensor:
    """Any bits are weights, and zero points, of four bits."""
    return torch.randint(-(2**31), 2**31, (EXPERTS, *shape), dtype=torch.int32, device="cuda")


def scales(kind: str, inputs: int, outputs: int) -> torch.Tensor:
    if kind == "mxfp4":
        exponents = torch.randint(
            118, 123, (EXPERTS, inputs // 32, outputs), dtype=torch.uint8, device="cuda"
        )
        return exponents.view(torch.float8_e8m0fnu)
    return torch.rand(EXPERTS, inputs // GROUP, outputs, device="cuda").bfloat16() / 64


def weights_of(kind: str) -> Tensors:
    """Of ``fused_marlin_moe``, in Marlin's form; the same for every call."""
    torch.manual_seed(0)
    both = 2 * INTERMEDIATE
    found = {
        "w1": words(HIDDEN // 16, both * 2),
        "w2": words(INTERMEDIATE // 16, HIDDEN * 2),
        "w1_scale": scales(kind, HIDDEN, both),
        "w2_scale": scales(kind, INTERMEDIATE, HIDDEN),
    }
    if kind == "int4 with zero points":
        found["w1_zeros"] = words(HIDDEN // GROUP, both // 8)
        found["w2_zeros"] = words(INTERMEDIATE // GROUP, HIDDEN // 8)
    if kind == "mxfp4":
        found["bias1"] = torch.randn(EXPERTS, both, device="cuda").bfloat16() / 16
        found["bias2"] = torch.randn(EXPERTS, HIDDEN, device="cuda").bfloat16() / 16
    return found


def in_a_pool(weights: Tensors) -> tuple[Tensors, torch.Tensor]:
    """The same experts anywhere among others' bytes, and the slot of each."""
    places = torch.randperm(SLOTS, device="cuda")[:EXPERTS]
    pool = {}
    for name, tensor in weights.items():
        rows = torch.full(
            (SLOTS, *tensor.view(torch.uint8).shape[1:]), 0x7F, dtype=torch.uint8, device="cuda"
        )
        rows[places] = tensor.view(torch.uint8)
        pool[name] = rows.view(tensor.dtype)
    slot_of = torch.full((EXPERTS + 1,), -1, dtype=torch.int32, device="cuda")
    slot_of[:-1] = places
    return pool, slot_of


def call_of(tokens: int) -> dict[str, Any]:
    torch.manual_seed(tokens)
    weights, ids = torch.rand(tokens, EXPERTS, device="cuda").topk(TOP_K)
    return {
        "hidden_states": torch.randn(tokens, HIDDEN, device="cuda").bfloat16(),
        "topk_weights": weights.float(),
        "topk_ids": ids.int(),
    }


def run(kind: str, weights: Tensors, call: dict[str, Any]) -> torch.Tensor:
    """As MarlinExperts.apply calls it."""
    from vllm.model_executor.layers.fused_moe.experts import marlin_moe
    from vllm.scalar_type import scalar_types

    types = {
        "int4": scalar_types.uint4b8,
        "int4 with zero points": scalar_types.uint4,
        "mxfp4": scalar_types.float4_e2m1f,
    }
    tensors = dict.fromkeys(("bias1", "bias2")) | weights
    experts = object.__new__(marlin_moe.MarlinExperts)
    out = torch.full_like(call["hidden_states"], float("nan"))
    marlin_moe.fused_marlin_moe(
        **tensors,
        **call,
        quant_type_id=types[kind].id,
        global_num_experts=EXPERTS,
        moe_sum=experts.moe_sum,
        output=out,
    )
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 2, 5, 33, 512, 4096])
def test_bit_equal_to_the_models_own_weights(kind, tokens):
    weights = weights_of(kind)
    pool, slot_of = in_a_pool(weights)
    expected = run(kind, weights, call_of(tokens))
    assert bool(torch.isfinite(expected).all())
    with on_slots(SlotMap(EXPERTS, slot_of)):
        assert torch.equal(run(kind, pool, call_of(tokens)), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 33])
def test_waves_add_up_and_read_nothing_that_is_absent(kind, tokens):
    weights = weights_of(kind)
    pool, slot_of = in_a_pool(weights)
    total = torch.zeros(tokens, HIDDEN, device="cuda")
    for wave in range(4):
        present = slot_of.clone()
        present[:-1][torch.arange(EXPERTS, device="cuda") % 4 != wave] = -1
        with on_slots(SlotMap(EXPERTS, present, is_wave=True)):
            part = run(kind, pool, call_of(tokens)).float()
        assert bool(torch.isfinite(part).all())
        total += part
    expected = run(kind, weights, call_of(tokens)).float()
    torch.testing.assert_close(total, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("tokens", [2, 33])
def test_padding_changes_no_other_token(tokens):
    """A graph's: any ids, of absent experts; and -1, as VLLM_MOE_SKIP_PADDING has them."""
    weights = weights_of("int4")
    pool, slot_of = in_a_pool(weights)
    slot_of[EXPERTS - 1] = -1
    for padding in (EXPERTS - 1, -1):
        call = call_of(tokens)
        real = tokens - 1
        ids = call["topk_ids"]
        ids[:real] = torch.where(ids[:real] == EXPERTS - 1, 0, ids[:real])
        ids[real:] = padding
        expected = run("int4", weights, call)[:real]
        with on_slots(SlotMap(EXPERTS, slot_of)):
            assert torch.equal(run("int4", pool, call)[:real], expected)
