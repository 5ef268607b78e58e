"""Router lookahead: guesses judged as a plain reference judges them, trusted as measured."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from vllm_moe_offload.cache import PLAN_INSTANT, CacheShape, ExpertCache
from vllm_moe_offload.lookahead import MAX_ROWS, NUM_BINS, RouterLookahead, Routers
from vllm_moe_offload.native import NativeError
from vllm_moe_offload.policy import StepRows, TracePolicy
from vllm_moe_offload.predictor import Predictor

LAYERS, EXPERTS, TOP_K = 3, 12, 2


def decode_rows(count: int) -> StepRows:
    return StepRows.of_lengths(
        [f"r{index}" for index in range(count)],
        np.ones(count, np.int64),
        np.arange(count),
        np.zeros(count, np.bool_),
    )


class Model:
    """Routers that look at the hidden state through fixed matrices."""

    def __init__(self, *, alike: bool, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (EXPERTS, EXPERTS)
        first = torch.randn(shape, generator=generator)
        self.weights = [
            (first if alike else torch.randn(shape, generator=generator)).to(dtype)
            for _ in range(LAYERS)
        ]

    def lookahead(self, depth: int = 2) -> RouterLookahead:
        return RouterLookahead(Routers(torch.stack(self.weights)), TOP_K, depth)

    def ids(self, layer: int, hidden: torch.Tensor) -> np.ndarray:
        return (hidden @ self.weights[layer].T).topk(TOP_K, dim=1).indices.numpy()


NOTHING_RESIDENT = np.full(EXPERTS, -1, np.int32)


def reference(logits: np.ndarray, trust: np.ndarray, absent: np.ndarray) -> np.ndarray:
    """Probability that at least one row uses each expert, in numpy."""
    ordered = -np.sort(-logits, axis=1)
    boundary = ordered[:, TOP_K - 1 : TOP_K + 1].mean(axis=1, keepdims=True)
    deviation = logits.std(axis=1, keepdims=True)
    bins = np.floor(4 * (logits - boundary) / deviation) + NUM_BINS // 2
    bins = np.clip(bins, 0, NUM_BINS - 1).astype(int)
    chance = np.where(absent, trust[1][bins], trust[0][bins])
    return 1 - np.prod(1 - chance, axis=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5])
def test_guesses_are_those_of_the_reference(rows: int, dtype: torch.dtype) -> None:
    model = Model(alike=False, dtype=dtype)
    ahead = model.lookahead()
    ahead.trust[...] = np.random.default_rng(0).random(ahead.trust.shape)
    generator = torch.Generator().manual_seed(1)
    for number in range(20):
        hidden = torch.randn((rows, EXPERTS), generator=generator).to(dtype)
        slots = np.where(np.arange(EXPERTS) % 3 == number % 3, 7, -1).astype(np.int32)
        ahead.begin_step(decode_rows(rows))
        found = ahead.predict(0, 2, hidden, slots, 0.3)
        logits = (hidden @ model.weights[2].T).float().numpy()
        wanted = reference(logits, ahead.trust[1], slots < 0)
        assert dict(found) == pytest.approx(
            {e: wanted[e] for e in range(EXPERTS) if wanted[e] >= 0.3}, abs=1e-4
        )
        assert [chance for _, chance in found] == sorted(
            (chance for _, chance in found), reverse=True
        )


@pytest.mark.parametrize("alike", [True, False])
def test_guesses_are_trusted_as_far_as_they_were_right(alike: bool) -> None:
    model = Model(alike=alike)
    ahead = model.lookahead(depth=1)
    generator = torch.Generator().manual_seed(2)
    for _ in range(600):
        hidden = torch.randn((2, EXPERTS), generator=generator)
        ahead.begin_step(decode_rows(2))
        for layer in range(LAYERS):
            ahead.observe(layer, model.ids(layer, hidden if alike else hidden.flip(1)))
            ahead.predict(layer, 1, hidden, NOTHING_RESIDENT, 0.5)
        ahead.end_step()
    chosen = ahead.trust[0, 1, NUM_BINS // 2 + 1 : NUM_BINS // 2 + 3]
    if alike:
        assert chosen.min() > 0.95
    else:
        assert chosen.max() < 2.5 * TOP_K / EXPERTS


def test_padding_is_not_looked_at() -> None:
    model = Model(alike=True)
    ahead = model.lookahead()
    ahead.begin_step(decode_rows(1))
    hidden = torch.randn((4, EXPERTS), generator=torch.Generator().manual_seed(3))
    found = ahead.predict(0, 1, hidden, NOTHING_RESIDENT, 0.5)
    assert {expert for expert, _ in found} == set(model.ids(1, hidden[:1])[0].tolist())


def test_nothing_is_said_about_what_lies_beyond() -> None:
    ahead = Model(alike=True).lookahead()
    hidden = torch.randn((3, EXPERTS))
    ahead.begin_step(decode_rows(3))
    assert ahead.predict(LAYERS - 1, 1, hidden, NOTHING_RESIDENT, 0.5) is None
    assert ahead.predict(0, 1, None, NOTHING_RESIDENT, 0.5) is None
    assert ahead.predict(0, 1, hidden, NOTHING_RESIDENT, 0.5) is not None
    ahead.end_step()
    assert ahead.predict(0, 1, hidden, NOTHING_RESIDENT, 0.5) is None


def test_of_a_long_prompt_a_sample_is_looked_at() -> None:
    model = Model(alike=True)
    ahead = model.lookahead(depth=1)
    count = 10 * MAX_ROWS
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn((count, EXPERTS), generator=generator)
    hidden[:, :] = hidden[:1]
    hidden[count // 2 :] = torch.randn((1, EXPERTS), generator=generator)
    rows = StepRows.of_lengths(["a"], np.array([count]), np.array([0]), np.array([True]))
    for _ in range(30):
        ahead.begin_step(rows)
        for layer in range(LAYERS):
            ahead.observe(layer, model.ids(layer, hidden))
            found = ahead.predict(layer, 1, hidden, NOTHING_RESIDENT, 0.9)
            if layer + 1 < LAYERS:
                assert found is not None
                both = {*model.ids(layer + 1, hidden[[0, -1]]).flatten().tolist()}
                assert both <= {expert for expert, _ in found}
        ahead.end_step()


def test_routers_with_biases_and_of_other_types() -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn((LAYERS, EXPERTS, 6), generator=generator).bfloat16()
    bias = torch.randn((LAYERS, EXPERTS), generator=generator).bfloat16()
    hidden = torch.randn((2, 6), generator=generator)
    found = Routers(weight, bias).logits(hidden, 1, 3)
    wanted = torch.cat([hidden @ weight[at].float().T + bias[at].float() for at in (1, 2)], 1)
    assert found.dtype == torch.float32
    assert torch.allclose(found, wanted, atol=0.1)


def test_an_id_that_is_no_expert_is_an_error() -> None:
    ahead = Model(alike=True).lookahead()
    ahead.begin_step(decode_rows(1))
    ahead.predict(0, 1, torch.ones((1, EXPERTS)), NOTHING_RESIDENT, 0.5)
    with pytest.raises(NativeError, match=r"expert id 12 is outside \[0, 12\)"):
        ahead.observe(1, np.array([[3, EXPERTS]]))


def test_impossible_top_k_is_an_error() -> None:
    ahead = RouterLookahead(Routers(torch.zeros(2, EXPERTS, EXPERTS)), EXPERTS, 1)
    ahead.begin_step(decode_rows(1))
    with pytest.raises(NativeError, match=r"top_k must lie in \[1, 12\), got 12"):
        ahead.predict(0, 1, torch.zeros((1, EXPERTS)), NOTHING_RESIDENT, 0.5)


@pytest.mark.parametrize("max_reads", [1, 2, 8])
@pytest.mark.parametrize("rows", [1, 3])
def test_foreseeing_in_one_call_is_foreseeing_step_by_step(rows: int, max_reads: int) -> None:
    model = Model(alike=False)
    generator = torch.Generator().manual_seed(6)
    pairs = []
    for _ in range(2):
        cache = ExpertCache(CacheShape(LAYERS, EXPERTS, 14), TracePolicy.rules)
        scores = np.random.default_rng(1).random((LAYERS, EXPERTS))
        cache.scores[...] = scores.astype(np.float32)
        pairs.append((model.lookahead(), cache))
    for step in range(40):
        hidden = torch.randn((rows, EXPERTS), generator=generator)
        for layer in range(LAYERS):
            found = []
            for index, (ahead, cache) in enumerate(pairs):
                if layer == 0:
                    ahead.begin_step(decode_rows(rows))
                ids = np.ascontiguousarray(model.ids(layer, hidden), np.int64)
                ahead.observe(layer, ids)
                cache.plan(layer, ids, PLAN_INSTANT)
                cache.finish()
                one_call = ahead.foresee if index else partial(Predictor.foresee, ahead)
                found.append(one_call(layer, hidden, cache, 0.8, max_reads))
                for *_, row in found[-1]:
                    cache.complete(row, step % 5 != 0)
                if layer == LAYERS - 1:
                    ahead.end_step()
            assert found[0] == found[1]
            assert len(found[0]) <= max_reads
            assert np.array_equal(pairs[0][1].page_table, pairs[1][1].page_table)
    assert np.allclose(pairs[0][0].trust, pairs[1][0].trust)
    assert pairs[0][1].count("prefetch_issued") > 20
