"""Speculation with offload: what plain vLLM generates with the same speculation, bitwise."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.demo_model.mtp import DENSE_LAYERS, write_dense_model, write_eagle_head
from tests.integration.conftest import MAX_MODEL_LEN, SHAPE, Job, Run, engine, prompt
from tests.integration.test_identity import offload
from vllm_moe_offload.replay.run import replay_recorded
from vllm_moe_offload.trace.routing import load_trace

pytestmark = pytest.mark.vllm
ARCH = "qwen3_moe"
"""Its text soon repeats itself, so that n-grams are found again."""

LARGEST_TIE = 0.1
"""Of two logprobs: what bfloat16 makes of logits of this size."""
LAST = [prompt(9, 5)]
"""A batch after which the engine goes: its worker does not learn how the last request ended."""

Result = dict[str, Any]


@pytest.fixture(scope="module")
def dense_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense_model(tmp_path_factory.mktemp("dense") / "llama")


def ngrams() -> dict[str, Any]:
    return {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    }


def draft_model(model: Path) -> dict[str, Any]:
    return {"method": "draft_model", "model": str(model), "num_speculative_tokens": 3}


def job(model: Path, **options: Any) -> Job:
    """An engine whose requests go on long enough that a text repeats itself."""
    return {**engine(model, eager=True, **options), "max_tokens": 24}


def speculate(
    model: Path,
    speculation: dict[str, Any],
    store_dir: Path,
    run: Run,
    *,
    draft_layers: int = 0,
    **options: Any,
) -> tuple[Result, Result]:
    """A plain engine without speculation, and one with it that an offloaded one was equal to.

    ``draft_layers``: of the drafter, those with experts in the cache.
    """
    jobs = [job(model, **options)]
    options["speculative_config"] = speculation
    jobs += [job(model, **options), job(model, offload=offload(store_dir, "50%"), **options)]
    silent, plain, offloaded = run(jobs)
    assert "error" not in silent, silent
    assert "error" not in plain, plain
    assert "error" not in offloaded, offloaded
    assert all(name.startswith("Offloaded") for name in offloaded["facts"]["classes"])
    assert not any(name.startswith("Offloaded") for name in plain["facts"]["classes"])
    facts = offloaded["facts"]
    assert facts["misses"] > 0
    own_layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    own_layers -= DENSE_LAYERS if draft_layers else 0
    assert facts["layers"] == own_layers + draft_layers
    assert (facts["draft_needs"] > 0) == (draft_layers > 0)
    assert offloaded["batches"] == plain["batches"]
    # A wrong expert in a drafter changes no token, only how many are accepted.
    assert offloaded["speculation"] == plain["speculation"]
    assert plain["speculation"]["accepted_tokens"] > 0
    return silent, plain


def assert_same_but_for_ties(silent: Result, other: Result) -> list[int]:
    """Both generated the same; how many tokens of each request, before the first that differs.

    A step of several tokens may round otherwise than one of a single token, in plain vLLM, too:
    another token may come where two were as likely.
    """
    common = []
    for mine, theirs in zip(
        itertools.chain(*silent["batches"]), itertools.chain(*other["batches"]), strict=True
    ):
        same = [a == b for a, b in zip(mine["ids"], theirs["ids"], strict=True)]
        common.append(same.index(False) if False in same else len(same))
        if common[-1] < len(same):
            chances = mine["logprobs"][common[-1]]
            first, second = (run["ids"][common[-1]] for run in (mine, theirs))
            gap = float.fromhex(chances[str(first)]) - float.fromhex(chances[str(second)])
            assert gap < LARGEST_TIE
    return common


def test_ngrams(demo_model, store_dir, share_engines):
    """Feature: n-gram speculation; some of it is rejected."""
    silent, plain = speculate(demo_model(ARCH), ngrams(), store_dir, share_engines)
    assert_same_but_for_ties(silent, plain)
    assert plain["speculation"]["accepted_tokens"] < plain["speculation"]["draft_tokens"]


def recorded(path: Path) -> tuple[list[np.ndarray], list[int]]:
    """Routing of every request in the order of its coming, and how many of its tokens were prompt."""
    trace = load_trace(path)
    assert trace.prefill_lens is not None
    count = trace.num_requests - len(LAST)
    parts = [
        trace.ids[start : start + length]
        for start, length in zip(trace.starts[:count], trace.lens[:count], strict=True)
    ]
    return parts, trace.prefill_lens[:count].tolist()


def test_traces_are_those_of_the_generation(demo_model, store_dir, share_engines, tmp_path):
    """Feature: routing traces beside speculation; guesses that were wrong are not in them."""
    paths = [tmp_path / "silent.npz", tmp_path / "ngrams.npz"]
    options = [offload(store_dir, "50%") | {"record_trace": str(path)} for path in paths]
    model = demo_model(ARCH)
    jobs = [
        job(model, offload=options[0]),
        job(model, offload=options[1], speculative_config=ngrams()),
    ]
    for one in jobs:
        one["batches"] = [*one["batches"], LAST]
    silent, guessed = share_engines(jobs)
    assert "error" not in silent, silent
    assert "error" not in guessed, guessed
    rejected = (
        guessed["speculation"]["draft_tokens"] - guessed["speculation"]["accepted_tokens"]
    )
    assert rejected > 0
    schedule = load_trace(paths[1]).schedule
    assert schedule is not None
    # And guesses that were right, behind the last token that was asked for.
    assert len(schedule.recomputed_ids) >= rejected
    (mine, prompts), (theirs, their_prompts) = map(recorded, paths)
    assert prompts == their_prompts
    assert [part.shape for part in mine] == [part.shape for part in theirs]
    num_differing = num_compared = 0
    for a, b, prefill, same in zip(
        mine,
        theirs,
        prompts,
        assert_same_but_for_ties(silent, guessed)[: len(mine)],
        strict=True,
    ):
        differs = (a != b).any(axis=2)[: prefill + same]
        num_differing += int(differs.sum())
        num_compared += differs.size
    # A router, too, may choose between equals.
    assert num_differing <= 0.01 * num_compared
    replayed = replay_recorded(load_trace(paths[1]), "trace")
    assert (
        replayed.hits + replayed.misses == guessed["facts"]["hits"] + guessed["facts"]["misses"]
    )


def test_dense_draft_model(demo_model, dense_model, store_dir, share_engines):
    """Feature: a draft model without experts; most of what it proposes is rejected."""
    speculation = draft_model(dense_model)
    silent, plain = speculate(demo_model(ARCH), speculation, store_dir, share_engines)
    assert_same_but_for_ties(silent, plain)
    assert plain["speculation"]["accepted_tokens"] < plain["speculation"]["draft_tokens"]


@pytest.mark.slow
def test_the_model_drafts_for_itself(demo_model, store_dir, share_engines):
    """Feature: a draft model with experts; what it proposes is accepted, but for ties."""
    model = demo_model(ARCH)
    silent, plain = speculate(model, draft_model(model), store_dir, share_engines)
    assert_same_but_for_ties(silent, plain)
    assert plain["speculation"]["accepted_tokens"] > 0.9 * plain["speculation"]["draft_tokens"]


@pytest.mark.slow
def test_eagle_head(demo_model, store_dir, share_engines, tmp_path):
    """Feature: a drafter without experts that reads the model's hidden states."""
    head = write_eagle_head(tmp_path / "eagle", hidden=SHAPE["hidden"])
    speculation = {"method": "eagle", "model": str(head), "num_speculative_tokens": 3}
    silent, plain = speculate(demo_model(ARCH), speculation, store_dir, share_engines)
    assert_same_but_for_ties(silent, plain)
    assert plain["speculation"]["accepted_tokens"] < plain["speculation"]["draft_tokens"]


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_glm4_moe_predicts_more_tokens(count, mtp_model, store_dir, share_engines):
    """Feature: multi-token prediction by a layer with experts, used once or again and again."""
    speculation = {"method": "mtp", "num_speculative_tokens": count}
    model = mtp_model("glm4_moe")
    silent, plain = speculate(model, speculation, store_dir, share_engines, draft_layers=1)
    assert_same_but_for_ties(silent, plain)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
def test_deepseek_v3_predicts_more_tokens(count, mtp_model, store_dir, share_engines):
    """Feature: the same beside latent attention.

    On CPU vLLM computes latent attention of one token and of several with different kernels, so
    speculation rounds differently, and now and then another token is the likeliest.
    """
    speculation = {"method": "mtp", "num_speculative_tokens": count}
    # On CPU vLLM does not prefill prompts of these models in chunks, but with speculation it
    # still schedules no more than was asked for: a longer prompt would wait forever.
    room = {"max_num_batched_tokens": MAX_MODEL_LEN}
    model = mtp_model("deepseek_v3")
    speculate(model, speculation, store_dir, share_engines, draft_layers=1, **room)
