"""Triton experts on pool rows: tokens are put in blocks by logical ids, then renamed.

vLLM's Python is the real one; its CUDA operators and its kernel are doubles that do what theirs
do, block by block. ``tests/gpu/test_triton_kernels.py`` has the real kernels.
"""

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.fused_moe import fused_moe, get_config
from vllm.model_executor.layers.fused_moe import moe_align_block_size as align_module

from vllm_moe_offload.integration import triton_slots
from vllm_moe_offload.integration.block_slots import SlotMap, on_slots

EXPERTS, TOP_K, HIDDEN, BLOCK, ROWS = 16, 2, 4, 8, 50


@pytest.fixture(autouse=True, params=[-1, 0], ids=["unused:-1", "unused:0"])
def operators(monkeypatch, request):
    """``moe_align_block_size`` as vLLM's CUDA kernel fills its outputs.

    The expert of blocks that are not used depends on vLLM's version.
    """

    def align(ids, num_experts, block, token_ids, expert_ids, *rest):
        num_padded, expert_map, ignores_invalid = rest
        assert not ignores_invalid or expert_map is not None
        flat = ids.reshape(-1)
        assert int(flat.min()) >= -1
        assert int(flat.max()) < num_experts, "the kernel counts in an array of num_experts"
        token_ids.fill_(flat.numel())
        expert_ids.fill_(request.param)
        begin = 0
        for expert in range(num_experts):
            place = expert if expert_map is None else int(expert_map[expert])
            tokens = (flat == expert).nonzero().reshape(-1)
            if place < 0 and ignores_invalid:
                continue
            token_ids[begin : begin + tokens.numel()] = tokens.int()
            blocks = -(-tokens.numel() // block)
            expert_ids[begin // block : begin // block + blocks] = place
            begin += blocks * block
        num_padded.fill_(begin)

    monkeypatch.setattr(align_module.ops, "moe_align_block_size", align, raising=False)


def kernel(x, weight, assignment, ids, expert_map=None):
    """What ``fused_moe_kernel`` and ``moe_sum`` compute for ``weight`` ``[rows, hidden]``."""
    token_ids, expert_ids, num_padded = assignment
    top_k, num_ids = ids.shape[1], ids.numel()
    out = torch.full((num_ids, x.shape[1]), float("nan"))
    for block in range(int(num_padded) // BLOCK):
        row = int(expert_ids[block])
        for place in range(BLOCK):
            if token_ids is None:
                token = block if place == 0 else num_ids
            else:
                token = int(token_ids[block * BLOCK + place])
            if token < num_ids:
                out[token] = 0.0 if row == -1 else x[token // top_k] * weight[row]
    out = out.view(-1, top_k, x.shape[1])
    if expert_map is not None:  # vLLM's moe_sum asks the map that the call was given
        out = out.masked_fill((expert_map[ids.long()] < 0).unsqueeze(2), 0)
    return out.sum(1)


def assign(ids, rows, expert_map=None):
    """As TritonExperts.apply does; without an expert_map it knows the weights' rows only."""
    return triton_slots.prepare_expert_assignment(
        fused_moe._prepare_expert_assignment,
        ids,
        {"BLOCK_SIZE_M": BLOCK},
        ids.shape[0],
        ids.shape[1],
        rows,
        expert_map,
        ignore_invalid_experts=expert_map is not None,
    )


def a_call(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(tokens, HIDDEN, generator=generator)
    order = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)
    return x, order[:, :TOP_K].int().contiguous()


def in_a_pool(weight, seed=0):
    """The weight's experts anywhere among NaN, and the slot map that says where."""
    places = torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))[:EXPERTS]
    pool = torch.full((ROWS, weight.shape[1]), float("nan"))
    pool[places] = weight
    return pool, torch.cat([places, torch.tensor([-1])]).int()


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 40])  # up to 2: vLLM aligns nothing
def test_the_same_blocks_with_rows_for_experts(tokens):
    x, ids = a_call(tokens)
    weight = torch.rand(EXPERTS, HIDDEN)
    pool, slot_map = in_a_pool(weight)
    plain = assign(ids, EXPERTS)
    with on_slots(SlotMap(EXPERTS, slot_map)):
        ours = assign(ids, ROWS)
    assert (plain[0] is None) == (ours[0] is None) == (tokens * TOP_K * 4 <= EXPERTS)
    if plain[0] is not None:
        assert torch.equal(plain[0], ours[0])
    assert torch.equal(plain[2], ours[2])
    assert ours[1].dtype == torch.int32
    assert torch.equal(kernel(x, weight, plain, ids), kernel(x, pool, ours, ids))


@pytest.mark.parametrize("tokens", [1, 40])
def test_waves_add_up_and_read_nothing_that_is_absent(tokens):
    x, ids = a_call(tokens)
    weight = torch.rand(EXPERTS, HIDDEN)
    pool, slot_map = in_a_pool(weight)
    total = torch.zeros_like(x)
    for wave in range(3):
        absent = slot_map.clone()
        absent[:-1][torch.arange(EXPERTS) % 3 != wave] = -1
        with on_slots(SlotMap(EXPERTS, absent)):
            total += kernel(x, pool, assign(ids, ROWS), ids)
    expected = kernel(x, weight, assign(ids, EXPERTS), ids)
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("waves", [1, 3])
@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_expert_parallel_gives_what_plain_vllm_gives(tokens, waves):
    """vLLM's own map of the experts that the rank has stays in front of the slot map."""
    x, _ = a_call(tokens)
    num_experts = 2 * EXPERTS
    order = torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(3))
    ids = order.argsort(1)[:, :TOP_K].int().contiguous()
    expert_map = torch.full((num_experts,), -1, dtype=torch.int32)
    expert_map[1::2] = torch.arange(EXPERTS, dtype=torch.int32)
    weight = torch.rand(EXPERTS, HIDDEN)
    pool, slot_of = in_a_pool(weight)
    expected = kernel(x, weight, assign(ids, num_experts, expert_map), ids, expert_map)
    total = torch.zeros_like(x)
    for wave in range(waves):
        present = slot_of.clone()
        present[:-1][torch.arange(EXPERTS) % waves != wave] = -1
        with on_slots(SlotMap(EXPERTS, present, is_wave=waves > 1)):
            ours = assign(ids, num_experts, expert_map)
        total += kernel(x, pool, ours, ids, expert_map)
    torch.testing.assert_close(total, expected)
    assert bool(expected.any()) or tokens == 1


@pytest.mark.parametrize("tokens", [2, 8, 40])  # the first without alignment
def test_padding_reads_no_record(tokens):
    """Padding has the id -1 (VLLM_MOE_SKIP_PADDING): no expert's, and not the last one's."""
    x, ids = a_call(tokens)
    real = tokens - 1
    ids[real:] = -1
    pool, slot_map = in_a_pool(torch.rand(EXPERTS, HIDDEN))
    used = set(slot_map[ids[:real].unique().long()].tolist())
    with on_slots(SlotMap(EXPERTS, slot_map)):
        ours = assign(ids, ROWS)
    assert (ours[0] is None) == (tokens == 2)
    assert set(ours[1].tolist()) <= used | {-1, int(slot_map[0])}  # 0: of unused blocks
    blocks = ours[1][: int(ours[2]) // BLOCK]
    assert set(blocks.tolist()) <= used | {-1}
    out = kernel(x, pool, ours, ids)
    with on_slots(SlotMap(EXPERTS, slot_map)):
        alone = kernel(x[:real], pool, assign(ids[:real].contiguous(), ROWS), ids[:real])
    torch.testing.assert_close(out[:real], alone)
    if ours[0] is None:
        assert not out[real:].any()


def test_outside_of_a_call_vllm_is_left_alone():
    _, ids = a_call(40)
    ours = assign(ids, EXPERTS)
    theirs = fused_moe._prepare_expert_assignment(
        ids, {"BLOCK_SIZE_M": BLOCK}, 40, TOP_K, EXPERTS, None
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class Layer:
    """A RoutedExperts on a pool of ``rows``, for choosing tile sizes."""

    local_num_experts = EXPERTS

    def __init__(self, rows):
        self.w13_weight = torch.empty(rows, 2 * HIDDEN, HIDDEN)
        self.w2_weight = torch.empty(rows, HIDDEN, HIDDEN)
        experts = SimpleNamespace(
            quant_config=SimpleNamespace(config_name=lambda dtype: None), block_shape=None
        )
        self.quant_method = SimpleNamespace(
            moe_kernel=SimpleNamespace(fused_experts=experts), apply=self.apply
        )

    def apply(self, *, layer, x, topk_weights, topk_ids, **_):
        self.chosen = fused_moe.try_get_optimal_moe_config(
            layer.w13_weight.shape, layer.w2_weight.shape, TOP_K, None, x.shape[0]
        )
        return x


def choose(rows, tokens):
    layer = Layer(rows)
    x, ids = a_call(tokens)
    slot_map = torch.zeros(EXPERTS + 1, dtype=torch.int32)
    triton_slots.apply_on_slots(
        layer, x, torch.ones(tokens, TOP_K), ids, SlotMap(EXPERTS, slot_map)
    )
    return layer.chosen


@pytest.fixture
def tuned(monkeypatch):
    """Tuning files for two numbers of experts, as vLLM ships them."""
    sizes = {EXPERTS: {1: {"BLOCK_SIZE_M": 16}, 64: {"BLOCK_SIZE_M": 64}}}
    sizes[ROWS] = {1: {"BLOCK_SIZE_M": 32}}
    monkeypatch.setattr(fused_moe, "get_moe_configs", lambda E, *_: sizes.get(E))


def test_tile_sizes_are_those_of_the_model_and_not_of_the_pool(tuned):
    for rows in (EXPERTS, ROWS, 7):
        assert choose(rows, 1) == {"BLOCK_SIZE_M": 16}
        assert choose(rows, 60) == {"BLOCK_SIZE_M": 64}
    assert get_config() is None


def test_default_tile_sizes_too(monkeypatch):
    monkeypatch.setattr(fused_moe, "get_moe_configs", lambda *_: None)
    tokens = 129 * EXPERTS  # more than 128 tokens per expert group blocks, fewer do not
    x = torch.empty(tokens, HIDDEN)
    shapes = (EXPERTS, 2 * HIDDEN, HIDDEN), (EXPERTS, HIDDEN, HIDDEN)
    plain = fused_moe.try_get_optimal_moe_config(*shapes, TOP_K, None, tokens)
    wide = [(ROWS, *shape[1:]) for shape in shapes]
    assert fused_moe.try_get_optimal_moe_config(*wide, TOP_K, None, tokens) != plain
    assert triton_slots.tuning_config(Layer(ROWS), x, TOP_K) == plain
