"""What the figures of servers say about the cost of checking records."""

from typing import Any

import pytest

from scripts.check_cost import ARMS, Sample, summary

NEVER, FIRST, EVERY = ARMS


def a_round(seconds: float, stall_s: float, token_hash: int = 1) -> dict[str, Any]:
    """Of ten tokens, one of which was a prompt's."""
    return {
        "seconds": seconds,
        "stall_s": stall_s,
        "generated": 9,
        "tokens": 10,
        "hits": 3,
        "misses": 1,
        "records_read": 18,
        "token_hash": token_hash,
    }


def a_sample(first: float, every: float, token_hash: int = 1) -> Sample:
    """Of three rounds; seconds of each, of the engines that check."""
    seconds = {NEVER: 2.0, FIRST: first, EVERY: every}
    rounds = {
        name: [a_round(took, took - 1.5), a_round(1.0, 0.2), a_round(took, 0.3, token_hash)]
        for name, took in seconds.items()
    }
    return {"order": list(ARMS), "records": 20, "rounds": rounds}


def test_the_first_round_is_apart_and_arms_are_paired_by_repeat():
    found = summary([a_sample(2.5, 3.0), a_sample(3.0, 8.0), a_sample(2.25, 5.0)])
    never, first, every = (found["arms"][name] for name in ARMS)
    assert first["first_round_s"] == {"median": 2.5, "min": 2.25, "max": 3.0}
    assert first["first_round_s_more"]["median"] == pytest.approx(0.5)
    assert first["first_round_stall_s_more"]["max"] == pytest.approx(1.0)
    assert never["tokens_per_s"]["median"] == pytest.approx(18 / 3)
    assert every["tokens_per_s_ratio"]["median"] == pytest.approx(3 / 6)
    assert never["stall_ms_per_token"]["median"] == pytest.approx(25)
    assert never["hit_rate"]["median"] == 0.75
    assert never["records_read_share"]["median"] == 0.9
    assert found["same_tokens"]


def test_other_tokens_of_one_arm_are_told():
    other = a_sample(2.5, 3.0)
    other["rounds"][EVERY][1]["token_hash"] = 2
    assert not summary([a_sample(2.5, 3.0), other])["same_tokens"]
