"""Which drafters there may be beside offload, and what they change; of made-up configurations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_moe_offload.config import OptionError
from vllm_moe_offload.integration import speculation


def config_of(method: str | None, **changes: Any) -> Any:
    draft = SimpleNamespace(model="draft")
    speculative = None
    if method is not None:
        speculative = SimpleNamespace(
            method=method,
            num_speculative_tokens=3,
            parallel_drafting=False,
            draft_model_config=draft,
            uses_draft_model=lambda: method == "draft_model",
        )
    fields = {
        "speculative_config": speculative,
        "scheduler_config": SimpleNamespace(async_scheduling=True),
        "model_config": SimpleNamespace(model="target"),
        "use_v2_model_runner": False,
    }
    return SimpleNamespace(**(fields | changes))


@pytest.mark.parametrize(
    "method", [None, "ngram", "suffix", "draft_model", "eagle", "eagle3", "medusa", "mtp"]
)
def test_these_may_draft(method: str | None) -> None:
    assert list(speculation.problems(config_of(method))) == []


@pytest.mark.parametrize(
    "method", ["ngram_gpu", "dflash", "extract_hidden_states", "custom_class"]
)
def test_others_are_refused_by_name(method: str) -> None:
    (problem,) = speculation.problems(config_of(method))
    assert problem.startswith(f"speculative_config.method={method!r}: ")
    assert problem.endswith("allowed: ngram, suffix, draft_model, eagle, eagle3, medusa, mtp")


def test_with_a_drafter_scheduling_is_not_asynchronous() -> None:
    """Else the positions that the host knows are guesses, and so is what is verified."""
    drafting, plain = config_of("ngram"), config_of(None)
    speculation.prepare(drafting)
    speculation.prepare(plain)
    assert drafting.scheduler_config.async_scheduling is False
    assert plain.scheduler_config.async_scheduling is True


def test_the_runtime_waits_for_drafters_that_are_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = SimpleNamespace(is_last_rank=True)
    monkeypatch.setattr(speculation, "get_pp_group", lambda: stage)
    assert speculation.loads_a_drafter(config_of("mtp"))
    assert speculation.loads_a_drafter(config_of("draft_model"))
    assert not speculation.loads_a_drafter(config_of("ngram"))
    assert not speculation.loads_a_drafter(config_of(None))
    stage.is_last_rank = False
    assert not speculation.loads_a_drafter(config_of("mtp"))


def test_a_whole_model_that_drafts_keeps_its_experts() -> None:
    config = config_of("draft_model")
    assert not speculation.is_draft_model(config)
    config.model_config = config.speculative_config.draft_model_config
    assert speculation.is_draft_model(config)
    head = config_of("mtp")
    head.model_config = head.speculative_config.draft_model_config
    assert not speculation.is_draft_model(head)
    assert not speculation.is_draft_model(config_of(None))


def test_who_drafts() -> None:
    config = config_of("mtp")
    assert speculation.drafts(config, config.speculative_config.draft_model_config)
    assert not speculation.drafts(config, config.model_config)
    ngrams = config_of("ngram")
    ngrams.speculative_config.draft_model_config = ngrams.model_config  # as vLLM has it
    assert not speculation.drafts(ngrams, ngrams.model_config)
    assert not speculation.drafts(config_of(None), config.model_config)


def test_passes_through_each_layer_of_a_drafter() -> None:
    assert speculation.passes_per_layer(config_of("mtp")) == 3
    assert speculation.passes_per_layer(config_of(None)) == 0


def test_passes_that_the_host_does_not_see_are_refused() -> None:
    speculation.check_own_experts(config_of("mtp"))
    with pytest.raises(OptionError, match="set VLLM_USE_V2_MODEL_RUNNER=0"):
        speculation.check_own_experts(config_of("mtp", use_v2_model_runner=True))
    parallel = config_of("eagle")
    parallel.speculative_config.parallel_drafting = True
    with pytest.raises(OptionError, match="parallel_drafting=True"):
        speculation.check_own_experts(parallel)
