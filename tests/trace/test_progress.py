"""Which positions of a request are new, and which of those are prompt."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_moe_offload.trace.progress import RequestProgress


def steps(progress: RequestProgress, *parts: tuple[int, int, bool]) -> list[tuple[int, bool]]:
    """``(first position, tokens, is prefill)`` of each step."""
    return [
        progress.advance(np.arange(first, first + count), is_prefill)
        for first, count, is_prefill in parts
    ]


def test_prompt_and_answer() -> None:
    progress = RequestProgress(0)
    found = steps(progress, (0, 3, True), (3, 2, True), (5, 1, False), (6, 1, False))
    assert found == [(0, True), (0, True), (0, False), (0, False)]
    assert (progress.num_prefill, progress.num_decode, progress.high_water) == (5, 2, 7)


def test_what_is_computed_again_after_a_preemption_is_not_new() -> None:
    progress = RequestProgress(0)
    steps(progress, (0, 4, True), (4, 1, False))
    # Its own output is read again like a prompt, and one token more is generated.
    assert steps(progress, (0, 3, True), (3, 3, True)) == [(3, False), (2, False)]
    assert (progress.num_prefill, progress.num_decode, progress.high_water) == (4, 2, 6)


def test_a_prompt_that_was_preempted_is_still_prompt() -> None:
    progress = RequestProgress(0)
    steps(progress, (0, 4, True))
    assert steps(progress, (0, 6, True)) == [(4, True)]
    assert progress.num_prefill == 6


@pytest.mark.parametrize("is_prefill", [True, False])
def test_a_step_without_tokens_changes_nothing(is_prefill: bool) -> None:
    progress = RequestProgress(16, high_water=18, num_prefill=2)
    assert progress.advance(np.zeros(0, np.int64), is_prefill)[0] == 0
    assert progress == RequestProgress(16, high_water=18, num_prefill=2)


def test_positions_of_a_cached_prefix_count_nowhere_even_if_computed_later() -> None:
    progress = RequestProgress(16)
    steps(progress, (16, 2, True))
    assert steps(progress, (0, 19, True)) == [(18, True)]  # the prefix had left the cache
    assert progress.num_prefill == 3
