"""Which tokens run in which step: of B concurrent requests, or as a server ran them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.step import StepTokens
from vllm_moe_offload.trace.routing import Ids, RoutingTrace


class ReplayError(ValueError):
    """A replay was asked for that the trace cannot give."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Which tokens run in which step.

    Attributes:
        offsets: int64 ``[steps + 1]``; tokens of step i are ``offsets[i]:offsets[i + 1]``.
        token: int64 ``[tokens]``, index into the routing.
        request: int32 ``[tokens]``, index among the trace's requests.
        position: int64 ``[tokens]``, position in the request.
        ended: per step, the requests that ended before it.
        prefill_ends: int64 ``[requests]``, position after each request's prompt.
        is_draft: bool ``[tokens]``, whether a drafter guessed the token; None: none.
        last_ends: int64 ``[requests]``, position after each request's last token.
    """

    offsets: npt.NDArray[np.int64]
    token: npt.NDArray[np.int64]
    request: npt.NDArray[np.int32]
    position: npt.NDArray[np.int64]
    ended: list[list[int]]
    prefill_ends: npt.NDArray[np.int64]
    last_ends: npt.NDArray[np.int64]
    is_draft: npt.NDArray[np.bool_] | None = None

    @property
    def num_steps(self) -> int:
        """Steps."""
        return self.offsets.size - 1

    def tokens(self, step: int) -> StepTokens:
        """The step as a policy sees it; requests in the order of their first token."""
        tokens = slice(self.offsets[step], self.offsets[step + 1])
        requests, positions = self.request[tokens], self.position[tokens]
        starts = np.flatnonzero(np.diff(requests, prepend=-1))
        first = positions[starts]
        num_drafted = None
        if self.is_draft is not None:
            num_drafted = np.add.reduceat(self.is_draft[tokens], starts, dtype=np.int32)
        return StepTokens.of_lengths(
            [str(request) for request in requests[starts]],
            np.diff(starts, append=requests.size),
            first,
            first < self.prefill_ends[requests[starts]],
            num_drafted,
        )

    def ends(self, step: int) -> dict[str, int]:
        """Where what is verified ends, of all requests of which that shows at ``step``: those
        that go on there, and those that ended before."""
        tokens = self.tokens(step)
        first = tokens.positions[np.cumsum(tokens.lengths) - tokens.lengths]
        ends = dict(zip(tokens.requests, first.tolist(), strict=True))
        ends |= {str(request): int(self.last_ends[request]) for request in self.ended[step]}
        return ends

    def ids(self, routed: Ids, step: int) -> npt.NDArray[np.int32]:
        """Routing ``[layers, tokens, top_k]`` of one step; ``routed``: of the whole trace."""
        tokens = self.token[self.offsets[step] : self.offsets[step + 1]]
        return np.ascontiguousarray(routed[tokens].transpose(1, 0, 2), dtype=np.int32)


def decode_schedule(
    trace: RoutingTrace, concurrency: int, num_requests: int | None = None
) -> Schedule:
    """One token of every active request per step, ``concurrency`` requests at a time."""
    if concurrency < 1:
        raise ReplayError(f"concurrency must be at least 1, got {concurrency}")
    count = trace.num_requests if num_requests is None else num_requests
    if not 1 <= count <= trace.num_requests:
        raise ReplayError(
            f"requests must lie between 1 and the trace's {trace.num_requests}, got {count}"
        )
    pending = [request for request in range(count) if trace.lens[request] > 0]
    pending.reverse()
    active: list[list[int]] = []  # [request, next position]
    sizes, tokens, requests, positions = [], [], [], []
    ended: list[list[int]] = []
    finished: list[int] = []
    while True:
        while len(active) < concurrency and pending:
            active.append([pending.pop(), 0])
        if not active:
            break
        ended.append(finished)
        sizes.append(len(active))
        for entry in active:
            request, position = entry
            tokens.append(int(trace.starts[request]) + position)
            requests.append(request)
            positions.append(position)
            entry[1] = position + 1
        finished = [request for request, position in active if position >= trace.lens[request]]
        active = [entry for entry in active if entry[1] < trace.lens[entry[0]]]
    prefill = trace.prefill_lens
    return Schedule(
        offsets=np.concatenate(([0], np.cumsum(sizes, dtype=np.int64))).astype(np.int64),
        token=np.asarray(tokens, np.int64),
        request=np.asarray(requests, np.int32),
        position=np.asarray(positions, np.int64),
        ended=ended,
        prefill_ends=np.zeros(trace.num_requests, np.int64) if prefill is None else prefill,
        last_ends=trace.lens,
    )


def recorded_schedule(trace: RoutingTrace) -> Schedule:
    """The steps of the server that recorded the trace."""
    recorded = trace.schedule
    if recorded is None:
        raise ReplayError(
            "the trace carries no schedule: it was not written by record_trace; "
            "replay it with --schedule decode"
        )
    steps, starts = np.unique(recorded.row_step, return_index=True)
    by_step: dict[int, list[int]] = {}
    for request in np.flatnonzero(recorded.end_steps >= 0):
        # Served steps only: an end is seen at the next step that computed something.
        at = int(np.searchsorted(steps, recorded.end_steps[request]))
        by_step.setdefault(at, []).append(int(request))
    prefill = trace.prefill_lens
    return Schedule(
        offsets=np.append(starts, recorded.row_step.size).astype(np.int64),
        token=recorded.row_token,
        request=recorded.row_request,
        position=recorded.row_position,
        ended=[by_step.get(step, []) for step in range(steps.size)],
        prefill_ends=recorded.first_positions + (0 if prefill is None else prefill),
        last_ends=recorded.first_positions + trace.lens,
        is_draft=recorded.row_is_draft,
    )
