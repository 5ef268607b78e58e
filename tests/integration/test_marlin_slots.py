"""Marlin experts on slots: tokens are put in blocks by logical ids, -1 never reaches the kernel.

vLLM's Python is the real one; its CUDA operators are doubles (``simulated_marlin.py``).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.fused_moe.experts import marlin_moe
from vllm.scalar_type import scalar_types

from tests.integration.conftest import engine
from tests.integration.simulated_marlin import (
    align,
    gemm,
    marlin_operators,
    simulated_marlin,
)
from tests.integration.test_formats import (
    ALL_EXPERTS,
    EXPERTS,
    Quantised,
    assert_as_planned,
    kernels,
    models_in,
    ours,
)
from tests.integration.test_identity import assert_identical, offload
from vllm_moe_offload.config import OptionError
from vllm_moe_offload.integration import formats, marlin_slots, patching
from vllm_moe_offload.integration.block_slots import SlotMap, on_slots

NUM_EXPERTS, SLOTS, TOP_K, HIDDEN, INTERMEDIATE, GROUP = 8, 30, 2, 64, 128, 32


@pytest.fixture
def marlin():
    with simulated_marlin():
        yield


def weights_of(seed: int = 0) -> dict[str, torch.Tensor]:
    """``fused_marlin_moe``'s tensors with a row per expert, int4 with zero points and biases."""
    generator = torch.Generator().manual_seed(seed)

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(
            -(2**31), 2**31, (NUM_EXPERTS, *shape), dtype=torch.int32, generator=generator
        )

    def numbers(*shape: int) -> torch.Tensor:
        return torch.rand(NUM_EXPERTS, *shape, generator=generator).bfloat16()

    both = 2 * INTERMEDIATE
    return {
        "w1": words(HIDDEN // 16, both * 2),
        "w2": words(INTERMEDIATE // 16, HIDDEN * 2),
        "w1_scale": numbers(HIDDEN // GROUP, both),
        "w2_scale": numbers(INTERMEDIATE // GROUP, HIDDEN),
        "w1_zeros": words(HIDDEN // GROUP, both // 8),
        "w2_zeros": words(INTERMEDIATE // GROUP, HIDDEN // 8),
        "bias1": numbers(both),
        "bias2": numbers(HIDDEN),
    }


def in_a_pool(weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The same experts anywhere in a pool of others' bytes; the slot of each."""
    places = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(1))[:NUM_EXPERTS]
    pool = {}
    for name, tensor in weights.items():
        rows = torch.randint(0, 99, (SLOTS, *tensor.shape[1:])).to(tensor.dtype)
        rows[places] = tensor
        pool[name] = rows
    return pool, torch.cat([places, torch.tensor([-1])]).int()


def call_of(tokens: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(tokens)
    order = torch.rand(tokens, NUM_EXPERTS, generator=generator).argsort(1)
    return {
        "hidden_states": torch.rand(tokens, HIDDEN, generator=generator).bfloat16(),
        "topk_weights": torch.rand(tokens, TOP_K, generator=generator),
        "topk_ids": order[:, :TOP_K].int().contiguous(),
    }


def run(weights: dict[str, torch.Tensor], call: dict[str, Any]) -> torch.Tensor:
    """As MarlinExperts.apply calls it."""
    tokens = call["hidden_states"].shape[0]
    out = torch.full((tokens, HIDDEN), float("nan")).bfloat16()
    experts = object.__new__(marlin_moe.MarlinExperts)
    marlin_moe.fused_marlin_moe(
        **weights,
        **{"global_num_experts": NUM_EXPERTS, **call},
        quant_type_id=scalar_types.uint4.id,
        moe_sum=experts.moe_sum,
        output=out,
    )
    return out


@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
def test_the_same_bits_from_slots(marlin, tokens):
    weights = weights_of()
    pool, slot_of = in_a_pool(weights)
    expected = run(weights, call_of(tokens))
    assert bool(torch.isfinite(expected).all())
    with on_slots(SlotMap(NUM_EXPERTS, slot_of)):
        assert torch.equal(run(pool, call_of(tokens)), expected)


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_the_kernel_is_asked_for_the_models_tiles(marlin, monkeypatch, tokens):
    """They follow from E, which vLLM reads off the weights' shape, and not from the slots."""
    asked = []

    def note(a, c, weight, *args, moe_block_size, **options):
        asked.append((weight.shape[0], moe_block_size))
        return gemm(a, c, weight, *args, moe_block_size=moe_block_size, **options)

    monkeypatch.setattr(marlin_moe.ops, "moe_wna16_marlin_gemm", note)
    weights = weights_of()
    pool, slot_of = in_a_pool(weights)
    run(weights, call_of(tokens))
    with on_slots(SlotMap(NUM_EXPERTS, slot_of)):
        run(pool, call_of(tokens))
    assert asked[:2] == asked[2:]
    assert {experts for experts, _ in asked} == {NUM_EXPERTS}


@pytest.mark.parametrize("tokens", [1, 40])
def test_waves_add_up_and_read_nothing_that_is_absent(marlin, tokens):
    weights = weights_of()
    pool, slot_of = in_a_pool(weights)
    total = torch.zeros(tokens, HIDDEN)
    for wave in range(3):
        present = slot_of.clone()
        present[:-1][torch.arange(NUM_EXPERTS) % 3 != wave] = -1
        with on_slots(SlotMap(NUM_EXPERTS, present, is_wave=True)):
            part = run(pool, call_of(tokens)).float()
        assert bool(torch.isfinite(part).all()), "a row was summed that no block wrote"
        total += part
    torch.testing.assert_close(
        total, run(weights, call_of(tokens)).float(), rtol=2e-2, atol=2e-2
    )


def test_a_wave_works_with_fewer_slots_than_experts(marlin):
    weights = weights_of()
    few = {name: tensor[:3] for name, tensor in weights.items()}
    slot_of = torch.tensor([0, 1, 2, *[-1] * (NUM_EXPERTS - 2)], dtype=torch.int32)
    call = call_of(9)
    with on_slots(SlotMap(NUM_EXPERTS, slot_of, is_wave=True)):
        out = run(few, call)
    used = (call["topk_ids"] < 3).any(1)
    assert bool(used.any())
    assert not bool(out[~used].any())
    assert bool(torch.isfinite(out).all())


def test_padding_of_a_graph_changes_no_other_token(marlin):
    """Its experts are absent and its blocks stay, so that the kernel divides its work alike."""
    weights = weights_of()
    pool, slot_of = in_a_pool(weights)
    call = call_of(6)
    call["topk_ids"] = torch.tensor([[0, 1], [2, 1], [0, 2], [0, 1], [7, 6], [5, 7]]).int()
    expected = run(weights, call)
    slot_of[3:] = -1
    with on_slots(SlotMap(NUM_EXPERTS, slot_of)):
        assert torch.equal(run(pool, call)[:4], expected[:4])


def test_padding_without_an_expert_is_in_no_block(marlin):
    weights = weights_of()
    pool, slot_of = in_a_pool(weights)
    call = call_of(6)
    call["topk_ids"][4:] = -1
    expected = run(weights, call)[:4]
    with on_slots(SlotMap(NUM_EXPERTS, slot_of)):
        assert torch.equal(run(pool, call)[:4], expected)


@pytest.mark.parametrize("unused", [-1, 0])
def test_block_experts_are_slots_and_never_negative(monkeypatch, unused):
    """Whatever vLLM's version leaves behind the last block that is used."""
    slot_of = torch.tensor([4, -1, 2, -1], dtype=torch.int32)

    def original(ids, block, experts, expert_map=None, *, ignore_invalid_experts=False):
        del expert_map, ignore_invalid_experts
        token_ids, expert_ids, num = (torch.empty(n, dtype=torch.int32) for n in (24, 6, 1))
        align(ids, experts, block, token_ids, expert_ids, num)
        expert_ids[int(num) // block :] = unused
        return token_ids, expert_ids, num

    ids = torch.tensor([[0, 2], [1, 2]], dtype=torch.int32)
    with on_slots(SlotMap(3, slot_of)):
        token_ids, expert_ids, _ = marlin_slots.moe_align_block_size(
            original, ids, 4, 3, None, ignore_invalid_experts=True
        )
    plain = original(ids, 4, 3)
    assert torch.equal(token_ids, plain[0])
    assert expert_ids[:3].tolist() == [4, 0, 2]
    assert int(expert_ids.min()) >= 0


def test_without_a_slot_map_calls_pass_unchanged(marlin):
    weights = weights_of()
    with marlin_operators():
        assert bool(torch.isfinite(run(weights, call_of(3))).all())


@pytest.mark.parametrize("waves", [1, 2])
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_expert_parallel_gives_what_plain_vllm_gives(marlin, tokens, waves):
    """vLLM's own map of the experts that the rank has stays in front of the slot map."""
    num_experts = 2 * NUM_EXPERTS
    call = call_of(tokens)
    order = torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(3))
    call["topk_ids"] = order.argsort(1)[:, :TOP_K].int().contiguous()
    call["global_num_experts"] = num_experts
    call["expert_map"] = torch.full((num_experts,), -1, dtype=torch.int32)
    call["expert_map"][1::2] = torch.arange(NUM_EXPERTS, dtype=torch.int32)
    weights = weights_of()
    pool, slot_of = in_a_pool(weights)
    expected = run(weights, call)
    total = torch.zeros(tokens, HIDDEN)
    for wave in range(waves):
        present = slot_of.clone()
        present[:-1][torch.arange(NUM_EXPERTS) % waves != wave] = -1
        with on_slots(SlotMap(NUM_EXPERTS, present, is_wave=waves > 1)):
            part = run(pool, call)
        if waves == 1:
            assert torch.equal(part, expected)
        total += part.float()
    torch.testing.assert_close(total, expected.float(), rtol=2e-2, atol=2e-2)


def test_a_vllm_with_other_arguments_is_refused(monkeypatch):
    monkeypatch.setattr(marlin_moe, "fused_marlin_moe", lambda w1, w2, expert_map: None)
    with pytest.raises(patching.UnsupportedVLLM, match="takes no bias1, bias2, w1_scale"):
        marlin_slots.install()


def test_too_little_memory_to_pack_in_is_told_by_name():
    def process_weights_after_loading(layer):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 11.00 GiB")

    layer = torch.nn.Module()
    layer.layer_name = "model.layers.3.mlp.experts"
    layer.quant_method = SimpleNamespace(
        process_weights_after_loading=process_weights_after_loading
    )
    (known, *_) = (row for row in formats.FORMATS if row.packs_on_device)
    with pytest.raises(OptionError, match=r"to pack the experts of model.layers.3.*11.00 GiB"):
        formats.pack(layer, known)


ON_HOST, ON_DEVICE = (
    next(row for row in formats.FORMATS if row.packs_on_device is where)
    for where in (False, True)
)


@pytest.mark.parametrize(
    ("known", "steps"),
    [(ON_HOST, ["pack"]), (ON_DEVICE, ["to the device", "pack", "to cpu"])],
    ids=["on the host", "on the device"],
)
def test_weights_are_packed_where_vllm_has_the_operators(known, steps, monkeypatch):
    seen = []
    monkeypatch.setattr(formats, "_move", lambda layer, where: seen.append(f"to {where}"))
    monkeypatch.setattr(formats, "current_platform", SimpleNamespace(device_type="the device"))
    method = SimpleNamespace(process_weights_after_loading=lambda layer: seen.append("pack"))
    formats.pack(SimpleNamespace(quant_method=method), known)
    assert seen == steps


# ---- engines ---------------------------------------------------------------------------

FORMATS = ("int4", "gptq", "awq", "fp8", "mxfp4", "nvfp4")
FAST = ("int4", "mxfp4")


@pytest.fixture(scope="session")
def model_in(tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    """The models of this session."""
    return models_in(tmp_path_factory.mktemp("marlin"))


@kernels
@pytest.mark.vllm
@pytest.mark.parametrize(
    "name",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FORMATS],
)
def test_packed_stored_and_served(name, model_in, store_dir, share_engines):
    """Features: Marlin's formats, packed by vLLM's own code, on the simulated GPU: half of the
    experts, one layer, and all; first and second start."""
    model, store_dir = model_in(name), store_dir / "marlin"  # not the CPU kernels' stores
    simulated = {"simulated_marlin": True, "cpu_kernels": ours()["cpu_kernels"]}
    plain = engine(model, eager=True, moe_backend="marlin") | simulated
    offloaded = [
        engine(
            model,
            eager=True,
            moe_backend="marlin",
            offload=offload(store_dir, share, **ours()),
        )
        | simulated
        | machine
        for share, machine in (
            ("50%", {"simulated_gpu": 0.75}),
            ("25%", {"simulated_gpu": 0.75}),
            ("100%", {"simulated_device": 0}),  # where all are resident, the formats are alike
        )
    ]
    results = share_engines([plain, *offloaded])
    assert_identical(results[:3], [ALL_EXPERTS // 2, EXPERTS])
    assert all(result["facts"]["misses"] for result in results[1:3])
    assert results[3].get("batches") == results[0]["batches"], results[3].get("trace")
    if name != "fp8":  # Marlin's form of it is for older GPUs alone; plans are for Triton's
        assert_as_planned(model, store_dir, "cuda")
    first = results[0]["batches"][0][0]["logprobs"][0]
    assert all(torch.isfinite(torch.tensor(float.fromhex(x))) for x in first.values())
