"""Whose tokens each pass of a drafter computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from vllm_moe_offload.integration import draft_passes
from vllm_moe_offload.step import StepTokens


class Runtime:
    """Notes the passes that it is told of."""

    def __init__(self) -> None:
        self.passes: list[list[int]] = []
        self.is_open = False

    @contextlib.contextmanager
    def draft_pass(self, tokens: StepTokens) -> Iterator[None]:
        votes = np.bincount(tokens.request_of_token, tokens.weights)
        assert np.allclose(votes, 1 / len(tokens.requests))
        self.passes.append(tokens.lengths.tolist())
        self.is_open = True
        yield
        self.is_open = False


@contextlib.contextmanager
def forward_context(*_: Any) -> Iterator[None]:
    yield


def run(runtime: Runtime | None) -> bool:
    """One run of the drafter; whether the runtime knew of it."""
    with draft_passes._set_forward_context(forward_context, None):
        return runtime is not None and runtime.is_open


def test_the_first_pass_is_of_the_steps_tokens_and_others_of_one_each() -> None:
    runtime: Any = Runtime()
    starts = torch.tensor([0, 4, 5, 8], dtype=torch.int32).numpy()
    with draft_passes._Passes(runtime, np.diff(starts)):
        assert run(runtime)
        assert not runtime.is_open
        assert run(runtime)
        assert run(runtime)
    assert runtime.passes == [[4, 1, 3], [1, 1, 1], [1, 1, 1]]


def test_runs_outside_of_a_proposal_are_nobodys() -> None:
    runtime: Any = Runtime()
    assert not run(runtime)
    with draft_passes._Passes(runtime, np.array([1])):
        run(runtime)
    assert not run(runtime)
    assert runtime.passes == [[1]]


def test_a_proposal_that_fails_ends() -> None:
    runtime: Any = Runtime()
    with (
        pytest.raises(RuntimeError, match="why"),
        draft_passes._Passes(runtime, np.array([1])),
    ):
        raise RuntimeError("why")
    assert not run(runtime)
