"""Speculation with offload: what plain vLLM generates with the same speculation, bitwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scripts.demo_model.mtp import write_dense_model, write_eagle_head
from tests.integration.conftest import MAX_MODEL_LEN, SHAPE, Job, Run, engine
from tests.integration.test_identity import offload

pytestmark = pytest.mark.vllm
ARCH = "qwen3_moe"
"""Its text soon repeats itself, so that n-grams are found again."""

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
    model: Path, speculation: dict[str, Any], store_dir: Path, run: Run, **options: Any
) -> tuple[Result, Result]:
    """A plain engine without speculation, and one with it that an offloaded one was equal to."""
    jobs = [job(model, **options)]
    options["speculative_config"] = speculation
    jobs += [job(model, **options), job(model, offload=offload(store_dir, "50%"), **options)]
    silent, plain, offloaded = run(jobs)
    assert "error" not in silent, silent
    assert "error" not in plain, plain
    assert "error" not in offloaded, offloaded
    assert all(name.startswith("Offloaded") for name in offloaded["facts"]["classes"])
    assert not any(name.startswith("Offloaded") for name in plain["facts"]["classes"])
    assert offloaded["facts"]["misses"] > 0
    assert offloaded["batches"] == plain["batches"]
    # A wrong expert in a drafter changes no token, only how many are accepted.
    assert offloaded["speculation"] == plain["speculation"]
    assert plain["speculation"]["accepted_tokens"] > 0
    return silent, plain


def tokens(result: Result) -> list[list[list[int]]]:
    """Generated ids by batch and prompt."""
    return [[output["ids"] for output in batch] for batch in result["batches"]]


def test_ngrams(demo_model, store_dir, share_engines):
    """Feature: n-gram speculation; some of it is rejected."""
    silent, plain = speculate(demo_model(ARCH), ngrams(), store_dir, share_engines)
    assert tokens(plain) == tokens(silent)
    assert plain["speculation"]["accepted_tokens"] < plain["speculation"]["draft_tokens"]


def test_dense_draft_model(demo_model, dense_model, store_dir, share_engines):
    """Feature: a draft model without experts; most of what it proposes is rejected."""
    speculation = draft_model(dense_model)
    silent, plain = speculate(demo_model(ARCH), speculation, store_dir, share_engines)
    assert tokens(plain) == tokens(silent)
    assert plain["speculation"]["accepted_tokens"] < plain["speculation"]["draft_tokens"]


def test_the_model_drafts_for_itself(demo_model, store_dir, share_engines):
    """Feature: a draft model with experts; all that it proposes is accepted."""
    model = demo_model(ARCH)
    silent, plain = speculate(model, draft_model(model), store_dir, share_engines)
    assert tokens(plain) == tokens(silent)
    assert plain["speculation"]["accepted_tokens"] == plain["speculation"]["draft_tokens"]


@pytest.mark.slow
def test_eagle_head(demo_model, store_dir, share_engines, tmp_path):
    """Feature: a drafter without experts that reads the model's hidden states."""
    head = write_eagle_head(tmp_path / "eagle", hidden=SHAPE["hidden"])
    speculation = {"method": "eagle", "model": str(head), "num_speculative_tokens": 3}
    silent, plain = speculate(demo_model(ARCH), speculation, store_dir, share_engines)
    assert tokens(plain) == tokens(silent)
    assert plain["speculation"]["accepted_tokens"] < plain["speculation"]["draft_tokens"]


@pytest.mark.parametrize("count", [1, 3])
def test_glm4_moe_predicts_more_tokens(count, mtp_model, store_dir, share_engines):
    """Feature: multi-token prediction by a layer with experts, used once or again and again."""
    speculation = {"method": "mtp", "num_speculative_tokens": count}
    silent, plain = speculate(mtp_model("glm4_moe"), speculation, store_dir, share_engines)
    assert tokens(plain) == tokens(silent)


@pytest.mark.parametrize("count", [1, pytest.param(3, marks=pytest.mark.slow)])
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
    speculate(model, speculation, store_dir, share_engines, **room)
