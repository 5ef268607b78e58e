"""Which token of a step is whose, and which are guesses."""

from __future__ import annotations

import numpy as np

from vllm_moe_offload.step import StepTokens, count_votes


def tokens_of(lengths: list[int], first: list[int], drafted: list[int]) -> StepTokens:
    names = [chr(ord("a") + index) for index in range(len(lengths))]
    no = np.zeros(len(lengths), np.bool_)
    return StepTokens.of_lengths(
        names, np.array(lengths), np.array(first), no, np.array(drafted, np.int32)
    )


def test_guesses_are_the_last_tokens_of_their_request() -> None:
    tokens = tokens_of([3, 1, 2], [5, 0, 8], [2, 0, 1])
    assert tokens.is_drafted().tolist() == [False, True, True, False, False, True]
    assert tokens_of([3, 1], [5, 0], [0, 0]).num_drafted is None


def test_votes_per_request_and_step_stay_one() -> None:
    tokens = tokens_of([3, 1, 2], [5, 0, 8], [2, 0, 1])
    votes = np.bincount(tokens.request_of_token, tokens.weights)
    assert np.allclose(votes, 1 / 3)


def test_verified_tokens_end_where_their_request_goes_on() -> None:
    tokens = tokens_of([3, 1, 2], [5, 0, 8], [2, 0, 1])
    assert tokens.is_verified({"a": 7, "b": 1, "c": 10}).tolist() == [1, 1, 0, 1, 1, 1]
    assert tokens.is_verified({"a": 0, "c": 9}).tolist() == [1, 0, 0, 1, 1, 0]
    kept = tokens.only(tokens.is_verified({"a": 7, "c": 9}))
    assert kept.lengths.tolist() == [2, 1, 1]
    assert kept.positions.tolist() == [5, 6, 0, 8]
    assert np.allclose(np.bincount(kept.request_of_token, kept.weights), 1 / 3)
    assert kept.num_drafted is None


def test_votes_are_weights_of_the_tokens_that_chose() -> None:
    votes = np.full(4, 9, np.float32)
    ids = np.array([[0, 2], [2, 3]], np.int32)
    count_votes(ids, np.array([0.25, 0.75], np.float32), votes)
    assert votes.tolist() == [0.25, 0, 1, 0.75]
