"""Which token of a step is whose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.native import check, core

IdArray = npt.NDArray[np.integer[Any]]
FloatArray = npt.NDArray[np.float32]


@dataclass(slots=True)
class StepTokens:
    """Which tokens of the running step belong to which request.

    Attributes:
        requests: identifiers of the requests in the step, one per request.
        request_of_token: int32 ``[tokens]``, index into ``requests``.
        positions: int64 ``[tokens]``, position of the token in its request.
        is_prefill: bool ``[requests]``, whether the request is still reading its prompt.
        weights: float32 ``[tokens]``; a request's tokens share one vote, so that a prefill
            chunk of 512 tokens weighs as much as a decode token:
            ``1 / (tokens of the request) / (requests in the step)``.
        num_drafted: int32 ``[requests]``, how many of the request's tokens, from the end, are a
            drafter's guesses: whether they are part of the request is known after the step. None:
            nobody's are.
    """

    requests: Sequence[str]
    request_of_token: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int64]
    is_prefill: npt.NDArray[np.bool_]
    weights: FloatArray
    num_drafted: npt.NDArray[np.int32] | None = None

    @classmethod
    def of_lengths(
        cls,
        requests: Sequence[str],
        lengths: npt.NDArray[np.integer[Any]],
        first_positions: npt.NDArray[np.integer[Any]],
        is_prefill: npt.NDArray[np.bool_],
        num_drafted: npt.NDArray[np.int32] | None = None,
    ) -> StepTokens:
        """Tokens of a step in which request i computes ``lengths[i]`` tokens in a row."""
        count = len(requests)
        lengths = np.asarray(lengths, np.int64)
        request_of_token = np.repeat(np.arange(count, dtype=np.int32), lengths)
        starts = np.cumsum(lengths) - lengths
        offsets = np.arange(request_of_token.size, dtype=np.int64) - starts[request_of_token]
        positions = np.asarray(first_positions, np.int64)[request_of_token] + offsets
        share = 1.0 / (np.maximum(lengths, 1) * max(count, 1))
        return cls(
            requests,
            request_of_token,
            positions,
            is_prefill,
            share.astype(np.float32)[request_of_token],
            num_drafted if num_drafted is not None and num_drafted.any() else None,
        )

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """int64 ``[requests]``, tokens of each."""
        return np.bincount(self.request_of_token, minlength=len(self.requests))

    def is_drafted(self) -> npt.NDArray[np.bool_]:
        """bool ``[tokens]``, a new array."""
        if self.num_drafted is None:
            return np.zeros(self.request_of_token.size, np.bool_)
        until_end = np.cumsum(self.lengths)[self.request_of_token] - np.arange(
            self.request_of_token.size
        )
        return np.asarray(until_end <= self.num_drafted[self.request_of_token], np.bool_)

    def is_verified(self, ends: Mapping[str, int]) -> npt.NDArray[np.bool_]:
        """Which tokens turned out to be their requests': bool ``[tokens]``, a new array.

        Args:
            ends: per request the position at which what is verified of it ends. Of a request that
                is not named no drafted token counts.
        """
        end = np.array([ends.get(request, 0) for request in self.requests], np.int64)
        return ~self.is_drafted() | (self.positions < end[self.request_of_token])

    def only(self, is_kept: npt.NDArray[np.bool_]) -> StepTokens:
        """Some of the tokens, none of which is a guess any more; they share votes afresh."""
        owners = self.request_of_token[is_kept]
        lengths = np.bincount(owners, minlength=len(self.requests))
        share = 1.0 / (np.maximum(lengths, 1) * max(len(self.requests), 1))
        return StepTokens(
            self.requests,
            owners,
            self.positions[is_kept],
            self.is_prefill,
            share.astype(np.float32)[owners],
        )


class TokenCount:
    """Tokens computed for good: those of steps, without guesses of a drafter that were wrong.

    Attributes:
        total: so far; guesses are among them once they are verified.
    """

    def __init__(self) -> None:
        self.total = 0
        self._guessed: StepTokens | None = (
            None  # the last step, if guesses are among its tokens
        )

    def end_step(self, tokens: StepTokens) -> None:
        """A step was computed."""
        self.total += tokens.request_of_token.size
        if tokens.num_drafted is not None:
            self.total -= int(tokens.num_drafted.sum())
            self._guessed = tokens

    def verify(self, ends: Mapping[str, int]) -> None:
        """Which guesses of the last step count: see :meth:`StepTokens.is_verified`."""
        if self._guessed is not None:
            verified = self._guessed.is_verified(ends) & self._guessed.is_drafted()
            self.total += int(verified.sum())
            self._guessed = None


def count_votes(ids: npt.NDArray[np.int32], weights: FloatArray, votes: FloatArray) -> None:
    """Sums the tokens' weights per expert that they chose, in the order and precision of serving.

    Args:
        ids: contiguous ``[tokens, top_k]``, of one layer.
        weights: ``[tokens]``, as :class:`StepTokens` has them.
        votes: float32 ``[num_experts]``, is overwritten.
    """
    check(
        core.vmo_expert_histogram(
            ids.ctypes.data,
            *ids.shape,
            ids.itemsize,
            weights.ctypes.data,
            votes.size,
            votes.ctypes.data,
        )
    )
