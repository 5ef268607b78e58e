"""The kernels compile for every GPU that is served, keep to registers, and never compile again."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.device.in_a_graph import InAGraph
from tests.device.kernels.harness import LAYOUT
from tests.device.kernels.targets import CAPABILITIES, Compiled, resources
from vllm_moe_offload.device import cache, kernels
from vllm_moe_offload.plan.ways import state_bytes

NUM_LAYERS = 61
EXPERTS = (8, 60, 128, 256, 384, 1024)
SLOTS = (100, 600, 1536, 4096, 8192, 16384)
CORNERS = ((8, 100), (128, 1536), (1024, 16384))
CELLS = [
    *(
        (90, experts, slots)
        for experts, slots in itertools.product(EXPERTS, (SLOTS[0], *SLOTS[-2:]))
    ),
    *((90, 128, slots) for slots in SLOTS[1:-2]),
    *((other, *corner) for other in CAPABILITIES if other != 90 for corner in CORNERS),
]
"""All that differ in how many threads plan, on one GPU; and the corners on all."""
SPILLED_BYTES = 32
"""At the most slots that are allowed, where 16 warps leave 128 registers for a thread."""


class Buffers:
    """What vLLM hands over: slices of long tensors that begin anywhere. Contents do not matter."""

    def __init__(self, max_tokens: int, top_k: int, dtype: torch.dtype) -> None:
        self.top_k = top_k
        self.ids = torch.zeros(max_tokens * top_k + 16, dtype=dtype)
        self.is_padding = torch.zeros(max_tokens + 16, dtype=torch.bool)
        self.weights = torch.zeros(max_tokens + 16, dtype=torch.int32)

    def tokens(
        self, num_tokens: int, begin: int = 0, expert_map: torch.Tensor | None = None
    ) -> cache.LayerTokens:
        ids = self.ids[begin : begin + num_tokens * self.top_k].view(num_tokens, self.top_k)
        rows = slice(begin, begin + num_tokens)
        return cache.LayerTokens(ids, self.is_padding[rows], self.weights[rows], expert_map)


def made(num_experts: int, num_slots: int, num_layers: int = NUM_LAYERS) -> cache.DeviceCache:
    """A cache that copies whatever lies anywhere: nothing here is launched."""
    max_tokens = 2 * num_experts + 1
    made = cache.DeviceCache(
        num_layers=num_layers,
        num_experts=num_experts,
        num_slots=num_slots,
        top_k=min(num_experts, 8),
        max_tokens=max_tokens,
        device=torch.device("cpu"),
    )
    slots = {spec.name: torch.zeros(1, dtype=torch.uint8) for spec in LAYOUT.tensors}
    made.attach(LAYOUT, slots, torch.zeros(1, LAYOUT.record_bytes, dtype=torch.uint8))
    return made


def call(device_cache: cache.DeviceCache, layer: int, tokens: cache.LayerTokens) -> None:
    if device_cache.num_slots < device_cache.num_experts:
        for _ in device_cache.waves(layer, tokens):
            pass
    else:
        device_cache.bring(layer, tokens)


def few_and_many(
    device_cache: cache.DeviceCache, buffers: Buffers, expert_map: torch.Tensor | None = None
) -> None:
    """One call of each kind, which is what a start has to warm up."""
    for num_tokens in (1, 2 * device_cache.num_experts):
        call(device_cache, 0, buffers.tokens(num_tokens, 0, expert_map))
    device_cache.rename(buffers.ids[:1])


@pytest.mark.parametrize(("capability", "num_experts", "num_slots"), CELLS)
def test_registers_suffice(
    capability: int, num_experts: int, num_slots: int, tmp_path: Path
) -> None:
    device_cache = made(num_experts, num_slots)
    buffers = Buffers(2 * num_experts, device_cache.top_k, torch.int32)
    with Compiled(capability, kernels) as compiled:
        few_and_many(device_cache, buffers)
        used = [(name, *resources(it, tmp_path)) for name, it in compiled.variants()]
    names = [name for name, _, _ in used]
    num_waves = int(num_slots < num_experts)
    assert sorted(names) == ["count", "gather", *["plan"] * (2 + num_waves), "rename"]
    print(
        f"\nsm_{capability}, {num_experts} experts, {num_slots} slots; registers (spilled bytes):"
    )
    print("  " + ", ".join(f"{name} {number} ({spilled})" for name, number, spilled in used))
    allowed = SPILLED_BYTES if num_slots > 8192 else 0
    assert max(spilled for _, _, spilled in used) <= allowed


@pytest.mark.parametrize("num_slots", [100, 600], ids=["waves", "at once"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_one_of_several_ranks(capability: int, num_slots: int, tmp_path: Path) -> None:
    device_cache = made(128, num_slots)
    buffers = Buffers(256, device_cache.top_k, torch.int32)
    with Compiled(capability, kernels) as compiled:
        few_and_many(device_cache, buffers, torch.zeros(256, dtype=torch.int32))
        spilled = [resources(it, tmp_path)[1] for _, it in compiled.variants()]
    assert len(spilled) == (6 if num_slots < 128 else 5)
    assert not any(spilled)


@pytest.fixture(scope="module")
def ptx() -> dict[str, str]:
    """Of every kernel, that of its last variant."""
    device_cache = made(128, 1536)
    with Compiled(90, kernels) as compiled:
        few_and_many(device_cache, Buffers(256, device_cache.top_k, torch.int32))
        return {name: it.asm["ptx"] for name, it in compiled.variants()}


def test_copies_are_of_16_bytes(ptx: dict[str, str]) -> None:
    loads = re.findall(r"ld\.global[\w.:]*\.v4\.[bu]32", ptx["gather"])
    stores = re.findall(r"st\.global[\w.:]*\.v4\.[bu]32", ptx["gather"])
    assert len(loads) == len(stores) >= 8, "of each thread, all under way at once"


def test_scores_round_as_numpys_do(ptx: dict[str, str]) -> None:
    """A product and a sum, and not both in one."""
    assert "mul.rn.f32" in ptx["plan"] or "mul.f32" in ptx["plan"]
    assert "fma.rn.f32" not in ptx["plan"]


NUM_EXPERTS, MAX_TOKENS, NUM_CALLS = 128, 256, 10_000
DTYPES = (torch.int32, torch.int64)


def caches() -> Iterator[cache.DeviceCache]:
    """Alike in all that kernels are compiled for; numbers of layers and slots that Triton would
    tell apart if it were let: 1, multiples of 16, and others."""
    for num_layers in (1, 16, NUM_LAYERS):
        for num_slots in (1030, 1536, 80, 101):
            yield made(NUM_EXPERTS, num_slots, num_layers)


def test_nothing_compiles_while_serving() -> None:
    rng = np.random.default_rng(0)
    expert_map = torch.zeros(2 * NUM_EXPERTS, dtype=torch.int32)
    buffers = [Buffers(MAX_TOKENS, 8, dtype) for dtype in DTYPES]
    served = list(caches())
    with Compiled(90, kernels) as compiled:
        for device_cache in (served[0], served[2]):
            for buffer in buffers:
                few_and_many(device_cache, buffer, expert_map)
                device_cache.warm_up(buffer.ids.dtype)
        num_warm = len(compiled.variants())
        for _ in range(NUM_CALLS):
            device_cache = served[rng.integers(len(served))]
            num_tokens = int(
                rng.choice([1, rng.integers(1, 40), rng.integers(1, MAX_TOKENS + 1)])
            )
            places = (None, expert_map)[rng.integers(2)]
            tokens = buffers[rng.integers(2)].tokens(num_tokens, int(rng.integers(16)), places)
            layer = int(rng.integers(device_cache.num_layers))
            call(device_cache, layer, tokens)
            device_cache.rename(tokens.ids)
            assert len(compiled.variants()) == num_warm, f"{num_tokens} tokens, layer {layer}"


@pytest.mark.parametrize("num_slots", [1536, 100], ids=["at once", "waves"])
@pytest.mark.parametrize("num_tokens", [1, 200], ids=["few tokens", "many"])
def test_launches_wait_for_nothing_and_make_no_tensor(num_tokens: int, num_slots: int) -> None:
    device_cache = made(NUM_EXPERTS, num_slots)
    buffers = Buffers(MAX_TOKENS, 8, torch.int32)
    tokens = buffers.tokens(num_tokens)
    with Compiled(90, kernels), InAGraph():
        call(device_cache, 0, tokens)
        device_cache.rename(tokens.ids)
        device_cache.note(0, tokens)


@pytest.mark.parametrize(("num_experts", "num_slots"), [(8, 20), (128, 1536), (384, 16384)])
def test_memory_is_what_a_plan_says(num_experts: int, num_slots: int) -> None:
    device_cache = made(num_experts, num_slots)
    tensors = [part for part in vars(device_cache).values() if isinstance(part, torch.Tensor)]
    taken = sum(tensor.nbytes for tensor in tensors)
    max_tokens = len(device_cache.log)
    taken += 5 * max_tokens  # votes, and that nobody pads
    said = state_bytes(
        num_layers=NUM_LAYERS,
        num_experts=num_experts,
        num_slots=num_slots,
        max_tokens=max_tokens,
        top_k=device_cache.top_k,
    )
    assert taken <= said <= 1.02 * taken + 1024
