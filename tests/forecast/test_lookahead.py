"""Router lookahead: guesses judged as a plain reference judges them, trusted as measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_moe_offload.cache.planner import PLAN_INSTANT, CacheShape, ExpertCache
from vllm_moe_offload.forecast import lookahead
from vllm_moe_offload.forecast.lookahead import (
    MAX_ASKED_TOKENS,
    NUM_BINS,
    RouterLookahead,
    Routers,
)
from vllm_moe_offload.native import NO_EXPERT, NativeError
from vllm_moe_offload.policy import TracePolicy
from vllm_moe_offload.step import StepTokens

LAYERS, EXPERTS, TOP_K, HIDDEN = 3, 12, 2, 37


def decode_tokens(count: int) -> StepTokens:
    return StepTokens.of_lengths(
        [f"r{index}" for index in range(count)],
        np.ones(count, np.int64),
        np.arange(count),
        np.zeros(count, np.bool_),
    )


def empty_cache() -> ExpertCache:
    """Room for nearly everything, so that all that is likely is named."""
    return ExpertCache(CacheShape(LAYERS, EXPERTS, LAYERS * EXPERTS - 1), TracePolicy.rules)


class Model:
    """Routers that look at the hidden state through fixed matrices."""

    def __init__(self, *, alike: bool, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (EXPERTS, HIDDEN)
        first = torch.randn(shape, generator=generator)
        self.weights = torch.stack(
            [first if alike else torch.randn(shape, generator=generator) for _ in range(LAYERS)]
        ).to(dtype)
        self.bias = torch.randn((LAYERS, EXPERTS), generator=generator).to(dtype)

    def lookahead(self, depth: int = 2) -> RouterLookahead:
        return RouterLookahead(Routers.of(self.weights, self.bias), TOP_K, depth)

    def logits(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.float() @ self.weights[layer].float().T + self.bias[layer].float()

    def ids(self, layer: int, hidden: torch.Tensor) -> np.ndarray:
        return self.logits(layer, hidden).topk(TOP_K, dim=1).indices.numpy()


def named(ahead: RouterLookahead, layer: int, hidden, cache: ExpertCache | None = None):
    """(layer, expert) of what is to be read, in order."""
    reads = ahead.foresee(layer, hidden, cache or empty_cache(), 1.0, 99).tolist()
    return [(target, expert) for target, expert, _ in reads]


def reference(logits: np.ndarray, trust: np.ndarray, absent: np.ndarray) -> np.ndarray:
    """Probability that at least one row uses each expert, in numpy."""
    ordered = -np.sort(-logits, axis=1)
    boundary = ordered[:, TOP_K - 1 : TOP_K + 1].mean(axis=1, keepdims=True)
    deviation = logits.std(axis=1, keepdims=True)
    bins = np.floor(4 * (logits - boundary) / deviation) + NUM_BINS // 2
    bins = np.clip(bins, 0, NUM_BINS - 1).astype(int)
    chance = np.where(absent, trust[1][bins], trust[0][bins])
    return 1 - np.prod(1 - chance, axis=0)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5])
def test_guesses_are_those_of_the_reference(
    rows: int, dtype: torch.dtype, given: torch.dtype, monkeypatch
) -> None:
    monkeypatch.setattr(lookahead, "LIKELY", 0.3)
    model = Model(alike=False, dtype=dtype)
    ahead = model.lookahead()
    ahead.trust[...] = np.random.default_rng(0).random(ahead.trust.shape)
    generator = torch.Generator().manual_seed(1)
    for number in range(20):
        cache = empty_cache()
        resident = np.flatnonzero(np.arange(EXPERTS) % 3 == number % 3).astype(np.int32)
        for layer in (1, 2):
            cache.plan(layer, resident, PLAN_INSTANT)
            cache.finish()
        absent = cache.page_table[1] < 0
        hidden = torch.randn((rows, HIDDEN), generator=generator).to(given)
        ahead.begin_step(decode_tokens(rows))
        wanted = []
        for distance in (0, 1):
            logits = model.logits(1 + distance, hidden).numpy()
            chance = reference(logits, ahead.trust[distance], absent)
            order = np.argsort(-chance, kind="stable")
            wanted += [(1 + distance, e) for e in order.tolist() if chance[e] >= 0.3]
        found = named(ahead, 0, hidden, cache)
        assert found == [key for key in wanted if key[1] not in resident]
        cache.scores[0] = 9.0  # what is expected stays all the same
        for expert in range(EXPERTS):
            cache.plan(0, np.array([expert], np.int32), PLAN_INSTANT)
            cache.finish()
        assert all(cache.page_table[key] >= 0 for key in wanted)


@pytest.mark.parametrize("alike", [True, False])
def test_guesses_are_trusted_as_far_as_they_were_right(alike: bool) -> None:
    model = Model(alike=alike)
    if alike:
        model.bias[...] = 0
    ahead = model.lookahead(depth=1)
    generator = torch.Generator().manual_seed(2)
    for _ in range(600):
        hidden = torch.randn((2, HIDDEN), generator=generator)
        ahead.begin_step(decode_tokens(2))
        for layer in range(LAYERS):
            ahead.observe(layer, model.ids(layer, hidden if alike else hidden.flip(1)))
            named(ahead, layer, hidden)
        ahead.end_step()
    chosen = ahead.trust[0, 1, NUM_BINS // 2 + 1 : NUM_BINS // 2 + 3]
    if alike:
        assert chosen.min() > 0.95
    else:
        assert chosen.max() < 3 * TOP_K / EXPERTS


def test_padding_is_not_looked_at() -> None:
    model = Model(alike=True)
    ahead = model.lookahead(depth=1)
    ahead.begin_step(decode_tokens(1))
    hidden = torch.randn((4, HIDDEN), generator=torch.Generator().manual_seed(3))
    found = named(ahead, 0, hidden)
    assert {expert for _, expert in found} == set(model.ids(1, hidden[:1])[0].tolist())


def test_nothing_is_said_about_what_lies_beyond() -> None:
    ahead = Model(alike=True).lookahead()
    hidden = torch.randn((3, HIDDEN), generator=torch.Generator().manual_seed(3))
    ahead.begin_step(decode_tokens(3))
    assert not named(ahead, LAYERS - 1, hidden)
    assert not named(ahead, 0, None)
    assert {layer for layer, _ in named(ahead, 0, hidden)} == {1, 2}
    ahead.end_step()
    assert not named(ahead, 0, hidden)


def test_of_a_long_prompt_a_sample_is_looked_at() -> None:
    model = Model(alike=True)
    model.bias[...] = 0
    ahead = model.lookahead(depth=1)
    count = 10 * MAX_ASKED_TOKENS
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn((count, HIDDEN), generator=generator)
    hidden[:, :] = hidden[:1]
    hidden[count // 2 :] = torch.randn((1, HIDDEN), generator=generator)
    tokens = StepTokens.of_lengths(["a"], np.array([count]), np.array([0]), np.array([True]))
    for _ in range(30):
        ahead.begin_step(tokens)
        for layer in range(LAYERS):
            ahead.observe(layer, model.ids(layer, hidden))
            found = named(ahead, layer, hidden)
            if layer + 1 < LAYERS:
                both = {*model.ids(layer + 1, hidden[[0, -1]]).flatten().tolist()}
                assert both <= {expert for _, expert in found}
        ahead.end_step()


@pytest.mark.parametrize("max_reads", [1, 2])
def test_the_nearest_and_most_likely_are_named_if_not_all_can_be(max_reads: int) -> None:
    model = Model(alike=False)
    ahead = model.lookahead()
    hidden = torch.randn((1, HIDDEN), generator=torch.Generator().manual_seed(6))
    ahead.begin_step(decode_tokens(1))
    everything = named(ahead, 0, hidden)
    assert len(everything) > max_reads
    cache = empty_cache()
    reads = ahead.foresee(0, hidden, cache, 1.0, max_reads)
    assert [tuple(read) for read in reads[:, :2].tolist()] == everything[:max_reads]
    for layer, expert, row in reads.tolist():
        assert cache.page_table[layer, expert] == row
    assert cache.count("prefetch_issued") == max_reads


def test_rows_of_no_expert_say_nothing_about_guesses() -> None:
    """What two rows teach, of which the second is padding, is what the first teaches."""
    model = Model(alike=True)
    hidden = torch.randn((2, HIDDEN), generator=torch.Generator().manual_seed(5))
    trusts = []
    for count in (1, 2):
        ahead = model.lookahead(depth=1)
        for _ in range(2 * LAYERS):
            ahead.begin_step(decode_tokens(count))
            for layer in range(LAYERS):
                chosen = model.ids(layer, hidden[:count])
                chosen[1:] = NO_EXPERT
                ahead.observe(layer, chosen)
                named(ahead, layer, hidden[:count])
            ahead.end_step()
        trusts.append(ahead.trust)
    np.testing.assert_array_equal(*trusts)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("where", [slice(0, 1), slice(None)])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
def test_a_token_that_is_not_finite_is_not_guessed_about(
    given: torch.dtype, where: slice, bad: float
) -> None:
    """Two tokens, of which the second is not, lead to what the first leads to: guesses and what
    is learned of them. 3e38 is finite, its logits are not."""
    model = Model(alike=True)
    hidden = torch.randn((2, HIDDEN), generator=torch.Generator().manual_seed(5))
    hidden[1, where] = bad
    hidden = hidden.to(given)
    found, trusts = [], []
    for count in (1, 2):
        ahead = model.lookahead()
        for _ in range(2 * LAYERS):
            ahead.begin_step(decode_tokens(count))
            for layer in range(LAYERS):
                ahead.observe(layer, np.array([[0, 1], [2, 3]])[:count])
                found.append(named(ahead, layer, hidden[:count]))
            ahead.end_step()
        trusts.append(ahead.trust)
    assert found[: len(found) // 2] == found[len(found) // 2 :]
    assert any(found)
    np.testing.assert_array_equal(*trusts)
    assert np.isfinite(trusts).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_without_a_finite_token_nothing_is_guessed_or_learned(bad: float) -> None:
    ahead = Model(alike=True).lookahead()
    before = ahead.trust.copy()
    for _ in range(2 * LAYERS):
        ahead.begin_step(decode_tokens(3))
        for layer in range(LAYERS):
            ahead.observe(layer, np.array([[0, 1]] * 3))
            assert not named(ahead, layer, torch.full((3, HIDDEN), bad))
        ahead.end_step()
    np.testing.assert_allclose(ahead.trust, before, rtol=1e-5)


def test_logits_that_overflow_when_they_are_summed_are_not_guessed_about() -> None:
    """Each of them is finite, their deviation is not."""
    ahead = RouterLookahead(Routers.of(torch.eye(EXPERTS).repeat(LAYERS, 1, 1)), TOP_K, 1)
    ahead.begin_step(decode_tokens(1))
    assert not named(ahead, 0, torch.linspace(1e38, 3e38, EXPERTS)[None])
    ahead.begin_step(decode_tokens(1))
    assert named(ahead, 0, torch.linspace(1e17, 3e17, EXPERTS)[None])


def test_evidence_that_faded_to_nothing_leaves_its_trust() -> None:
    ahead = Model(alike=True).lookahead()
    before = ahead.trust.copy()
    ahead._tried[...] = ahead._right[...] = 0
    ahead.begin_step(decode_tokens(1))
    ahead.observe(1, np.array([[0, 1]]))
    np.testing.assert_array_equal(ahead.trust, before)


def test_one_choice_of_no_expert_is_right_about_none() -> None:
    ahead = Model(alike=True).lookahead()
    ahead.begin_step(decode_tokens(1))
    named(ahead, 0, torch.ones((1, HIDDEN)))
    before = ahead._right.sum()
    ahead.observe(1, np.array([[3, NO_EXPERT]]))
    assert ahead._right.sum() == pytest.approx(before * 0.995 + 1)


def test_an_id_that_is_no_expert_is_an_error() -> None:
    ahead = Model(alike=True).lookahead()
    ahead.begin_step(decode_tokens(1))
    named(ahead, 0, torch.ones((1, HIDDEN)))
    with pytest.raises(NativeError, match=r"expert id 12 is outside \[0, 12\)"):
        ahead.observe(1, np.array([[3, EXPERTS]]))


def test_what_is_impossible_is_an_error() -> None:
    routers = Routers.of(torch.zeros(LAYERS + 1, EXPERTS, EXPERTS))
    with pytest.raises(NativeError, match=r"top_k must be positive and less than .*, got 12"):
        RouterLookahead(routers, EXPERTS, 1)
    with pytest.raises(NativeError, match="depth must be positive, got 0"):
        RouterLookahead(routers, 1, 0)
    ahead = RouterLookahead(routers, 1, 1)
    ahead.begin_step(decode_tokens(1))
    with pytest.raises(NativeError, match="the planner is one of another model"):
        ahead.foresee(0, torch.zeros(1, EXPERTS), empty_cache(), 1.0, 1)


# ---- expert parallel ---------------------------------------------------------------------


def own_part(model: Model, own: list[int]) -> tuple[RouterLookahead, ExpertCache]:
    """A rank's: it has some experts, the routers choose among all."""
    routers = Routers.of(model.weights, model.bias, own)
    cache = ExpertCache(CacheShape(LAYERS, len(own), LAYERS * len(own) - 1), TracePolicy.rules)
    return RouterLookahead(routers, TOP_K, 2), cache


@pytest.mark.parametrize("own", [[0, 1, 2, 3, 4, 5], [1, 3, 5, 7, 9, 11], [11, 2]])
def test_a_rank_guesses_its_own_experts_as_one_with_all_does(own: list[int]) -> None:
    model = Model(alike=False)
    whole, (part, cache) = model.lookahead(), own_part(model, own)
    part.trust[...] = whole.trust[...] = np.linspace(0, 1, NUM_BINS, dtype=np.float32)
    generator = torch.Generator().manual_seed(1)
    found = 0
    for _ in range(10):
        hidden = torch.randn((3, HIDDEN), generator=generator)
        for ahead in (whole, part):
            ahead.begin_step(decode_tokens(3))
        expected = [(layer, own.index(e)) for layer, e in named(whole, 0, hidden) if e in own]
        assert sorted(named(part, 0, hidden, cache)) == sorted(expected)
        cache = own_part(model, own)[1]
        found += len(expected)
    assert found


def observe_all(ahead, hidden, cache, ids) -> None:
    """A step whose layers all route to ``ids``."""
    for layer in range(LAYERS):
        named(ahead, layer, hidden, cache)
        ahead.observe(layer, ids)


def test_a_token_that_chose_none_of_the_own_experts_was_guessed_about() -> None:
    model = Model(alike=True)
    own = [0, 1, 2, 3]
    ahead, cache = own_part(model, own)
    hidden = torch.randn((1, HIDDEN), generator=torch.Generator().manual_seed(1))
    for _ in range(LAYERS):
        ahead.begin_step(decode_tokens(1))
        observe_all(ahead, hidden, cache, np.full((1, TOP_K), NO_EXPERT, np.int64))
    # The evidence of before fades with every step, and nothing guessed came true.
    assert ahead.trust[:, :, NUM_BINS // 2 :].min() < 0.75
    ahead.begin_step(decode_tokens(1))
    foreign = np.full((1, TOP_K), len(own), np.int64)
    with pytest.raises(NativeError, match="outside"):
        observe_all(ahead, hidden, cache, foreign)
