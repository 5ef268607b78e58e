"""Speculative decoding beside offload: which drafters there may be, and what they change.

A drafter guesses tokens that the model then computes in one step, as many of a request. That is
several tokens of a request per step to everything here. What a guess was worth shows after the
step (``verified.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from vllm.distributed.parallel_state import get_pp_group

from vllm_moe_offload.config import OptionError

logger = logging.getLogger("vllm.moe_offload")

WITHOUT_MODEL = ("ngram", "suffix")
"""Methods that guess from the text alone."""
WITH_MODEL = ("draft_model", "eagle", "eagle3", "medusa", "mtp")
"""Methods with weights, which vLLM loads after the model's, with its own loaders."""


def problems(config: Any) -> Iterator[str]:
    """What about a VllmConfig's drafter is not supported."""
    speculative = config.speculative_config
    if speculative is None:
        return
    if speculative.method not in (*WITHOUT_MODEL, *WITH_MODEL):
        yield (
            f"speculative_config.method={speculative.method!r}: what such a drafter does in a step "
            f"was not looked into; allowed: {', '.join((*WITHOUT_MODEL, *WITH_MODEL))}"
        )
    if getattr(speculative, "enable_adaptive_verification", False):
        yield (
            "speculative_config.enable_adaptive_verification=True: how many guesses a step has is "
            "decided on the device then, and whose tokens are whose is not known here; allowed: False"
        )


def loading_problems(speculative: Any, allowed: Sequence[str]) -> Iterator[str]:
    """Of how a drafter is loaded, what is not supported: the model's experts wait for it, whether
    it has some of its own or not. ``allowed``: formats whose loaders say when they are done."""
    load_config = getattr(speculative, "draft_load_config", None)
    if load_config is None:
        return
    name = getattr(load_config.load_format, "value", load_config.load_format)
    if name not in allowed:
        yield (
            f"speculative_config.draft_load_config.load_format={name!r}: the model's experts wait "
            f"for a drafter, and only these loaders tell: {', '.join(allowed)}"
        )


def prepare(config: Any) -> None:
    """Sets a VllmConfig without :func:`problems` up for its drafter.

    With asynchronous scheduling a step begins before it is known which of the last one's guesses
    were right, so that where its tokens lie is a guess, too. It would bring nothing where the host
    plans, which waits for the routing of every layer.
    """
    if config.speculative_config is not None and config.scheduler_config.async_scheduling:
        config.scheduler_config.async_scheduling = False
        logger.info(
            "MoE offload: async_scheduling is turned off: with speculative decoding, which tokens "
            "count has to be known before the next step"
        )


def loads_a_drafter(config: Any) -> bool:
    """Whether this worker loads a drafter's weights after the model's: in the last stage."""
    speculative = config.speculative_config
    return (
        speculative is not None
        and speculative.method in WITH_MODEL
        and bool(get_pp_group().is_last_rank)
    )


def is_draft_model(config: Any) -> bool:
    """Whether a VllmConfig is that of a whole model that drafts.

    Its experts, if it has any, stay in memory as in plain vLLM: it is there to be small, and of
    another shape than the model.
    """
    speculative = config.speculative_config
    return (
        speculative is not None
        and speculative.uses_draft_model()
        and drafts(config, config.model_config)
    )


def passes_per_layer(config: Any) -> float:
    """How often a step runs each of a drafter's MoE layers: once per guess. Of several modules for
    multi-token prediction vLLM's runner V1 runs the first for all guesses, and no other."""
    speculative = config.speculative_config
    return 0.0 if speculative is None else float(speculative.num_speculative_tokens)


def drafts(config: Any, model_config: Any) -> bool:
    """Whether ``model_config`` is that of a drafter with weights: workers load it after the model.

    Of a drafter without, vLLM gives the model's own in its place.
    """
    speculative = config.speculative_config
    return (
        speculative is not None
        and speculative.method in WITH_MODEL
        and model_config is speculative.draft_model_config
    )


def check_own_experts(config: Any) -> None:
    """Raises OptionError unless a drafter with experts of its own can run in passes that the
    host sees."""
    speculative = config.speculative_config
    if config.use_v2_model_runner:
        raise OptionError(
            f"--moe-offload: the drafter (speculative_config.method={speculative.method!r}) has "
            "experts of its own, whose passes vLLM's model runner V2 puts in one graph; set "
            "VLLM_USE_V2_MODEL_RUNNER=0"
        )
    if speculative.parallel_drafting:
        raise OptionError(
            "--moe-offload: speculative_config.parallel_drafting=True with a drafter that has "
            "experts of its own is not supported, allowed: False"
        )
