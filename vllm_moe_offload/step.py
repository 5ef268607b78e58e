"""Which token of a step is whose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

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
    """

    requests: Sequence[str]
    request_of_token: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int64]
    is_prefill: npt.NDArray[np.bool_]
    weights: FloatArray

    @classmethod
    def of_lengths(
        cls,
        requests: Sequence[str],
        lengths: npt.NDArray[np.integer[Any]],
        first_positions: npt.NDArray[np.integer[Any]],
        is_prefill: npt.NDArray[np.bool_],
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
        )
