"""Speculative decoding beside offload: which drafters there may be, and what they change.

A drafter guesses tokens that the model then computes in one step, as many of a request. That is
several tokens of a request per step to everything here. What a guess was worth shows after the
step (``verified.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

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
            f"speculative_config.method={speculative.method!r} is not supported, allowed: "
            f"{', '.join((*WITHOUT_MODEL, *WITH_MODEL))}"
        )


def prepare(config: Any) -> None:
    """Sets a VllmConfig without :func:`problems` up for its drafter.

    With asynchronous scheduling a step begins before it is known which of the last one's guesses
    were right, so that where its tokens lie is a guess, too. It brings nothing here: the host
    waits for the routing of every layer.
    """
    if config.speculative_config is not None and config.scheduler_config.async_scheduling:
        config.scheduler_config.async_scheduling = False
        logger.info(
            "MoE offload: async_scheduling is turned off: with speculative decoding, which tokens "
            "count has to be known before the next step"
        )


def loads_a_drafter(config: Any) -> bool:
    """Whether a worker loads a drafter's weights after the model's, in the last pipeline stage."""
    from vllm.distributed.parallel_state import get_pp_group

    speculative = config.speculative_config
    return (
        speculative is not None
        and speculative.method in WITH_MODEL
        and bool(get_pp_group().is_last_rank)
    )
