"""A rank's own experts: which they are, and that nothing of others gets into the sum."""

from __future__ import annotations

import pytest
import torch
from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map

from vllm_moe_offload.integration.expert_share import ExpertShare
from vllm_moe_offload.native import NO_EXPERT

EXPERTS, TOP_K, HIDDEN = 10, 3, 4


def share_of(rank: int, placement: str = "linear", ranks: int = 2) -> ExpertShare:
    _, expert_map, _ = determine_expert_map(ranks, rank, EXPERTS, placement)
    assert expert_map is not None
    return ExpertShare(expert_map)


@pytest.mark.parametrize("placement", ["linear", "round_robin"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_expert_is_one_ranks(placement, ranks):
    shares = [share_of(rank, placement, ranks) for rank in range(ranks)]
    assert sorted(expert for share in shares for expert in share.experts) == list(
        range(EXPERTS)
    )
    ids = torch.arange(EXPERTS, dtype=torch.int32).view(-1, 1)
    for share in shares:
        own = share.own_ids(ids).flatten()
        assert own[share.experts].tolist() == list(range(len(share.experts)))
        assert (own == NO_EXPERT).sum() == EXPERTS - len(share.experts)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_padding_is_nobodys(dtype):
    ids = torch.tensor([[NO_EXPERT, 0, 9]], dtype=dtype)
    first, second = (share_of(rank).own_ids(ids) for rank in range(2))
    assert first.dtype == second.dtype == dtype
    assert first.tolist() == [[NO_EXPERT, 0, NO_EXPERT]]
    assert second.tolist() == [[NO_EXPERT, NO_EXPERT, 4]]


def kernel(weights: torch.Tensor):
    """Experts that multiply, on slots; whatever a slot holds is computed."""

    def compute(x, topk_weights, slots):
        return (x[:, None] * weights[slots] * topk_weights[..., None]).sum(1)

    return compute


def with_stand_ins(own, slots):
    """As ``begin_layer`` gives them: an entry of another rank's lies where the token's first own
    one does; without any it may be anywhere."""
    slots = slots.clone()
    for token, ids in enumerate(own.tolist()):
        mine = [place for place, expert in enumerate(ids) if expert != NO_EXPERT]
        for place in range(TOP_K):
            if place not in mine:
                slots[token, place] = slots[token, mine[0]] if mine else 0
    return slots


@pytest.mark.parametrize("placement", ["linear", "round_robin"])
@pytest.mark.parametrize("tokens", [1, 2, 30])
def test_the_sum_over_ranks_is_the_layer(tokens, placement):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.rand(tokens, HIDDEN, generator=generator)
    topk_weights = torch.rand(tokens, TOP_K, generator=generator)
    ids = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :TOP_K].int()
    experts = torch.rand(EXPERTS, HIDDEN, generator=generator)
    total = torch.zeros_like(x)
    for rank in range(2):
        share = share_of(rank, placement)
        own = share.own_ids(ids)
        # What no own expert lies in is infinite, as memory that nobody wrote may be.
        pool = torch.full((20, HIDDEN), float("inf"))
        places = torch.arange(len(share.experts)) * 3 + 1
        pool[places] = experts[share.experts]
        slots = with_stand_ins(own, torch.where(own >= 0, places[own.long()].int(), 0))
        total += share.apply(kernel(pool), x, topk_weights, own, slots)
    torch.testing.assert_close(total, kernel(experts)(x, topk_weights, ids))


def test_a_token_of_other_ranks_experts_is_zero_here():
    own = torch.tensor([[NO_EXPERT, NO_EXPERT], [1, NO_EXPERT]], dtype=torch.int32)

    def infinite(x, topk_weights, slots):
        assert topk_weights.tolist() == [[0.0, 0.0], [1.0, 0.0]]
        out = x.clone()
        out[0] = float("inf")
        return out

    x = torch.ones(2, HIDDEN)
    out = ExpertShare.apply(infinite, x, torch.ones(2, 2), own, torch.full_like(own, 5))
    assert out.tolist() == [[0.0] * HIDDEN, [1.0] * HIDDEN]


def test_whose_experts_they_are_is_kept_in_ram_whatever_the_default():
    """vLLM builds models with the device as torch's default."""
    _, expert_map, _ = determine_expert_map(2, 0, EXPERTS, "linear")
    with torch.device("meta"):
        share = ExpertShare(expert_map)
        ids = torch.zeros((1, 1), dtype=torch.int32, device="cpu")
        assert share.own_ids(ids).tolist() == [[0]]


@pytest.mark.parametrize("tokens", [1, 3])
def test_where_no_token_has_an_own_expert_no_kernel_runs(tokens):
    own = torch.full((tokens, 2), NO_EXPERT, dtype=torch.int32)
    x = torch.ones(tokens, HIDDEN, dtype=torch.bfloat16)

    def never(*_):
        raise AssertionError("there is nothing to compute")

    out = ExpertShare.apply(never, x, torch.ones(tokens, 2), own, torch.zeros_like(own))
    assert out.dtype == x.dtype
    assert not out.any()
