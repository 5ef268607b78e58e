"""The workloads of the ablation: what is replayed, in which cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from scripts.replay_questions.shift import SHIFT_CAPACITY, SHIFT_CONCURRENCY, shifted_trace
from scripts.replay_questions.synthetic import SHAPE_FIELDS, SYNTHETIC
from scripts.replay_questions.young import Counted, Prepare, replay_counted
from scripts.synthetic_trace import synthetic_trace
from vllm_moe_offload.policy import Policy, TracePolicy
from vllm_moe_offload.replay.schedule import Schedule, decode_schedule, recorded_schedule
from vllm_moe_offload.step import FloatArray
from vllm_moe_offload.trace.routing import RoutingTrace

GPT_OSS_REQUESTS = {1: 3, 4: 8}
"""Concurrency to the first so many requests: about 300 tokens each."""
SHORT_REQUESTS, SHORT_TOKENS = {1: 32, 4: 100}, 24
"""The same requests, cut off after so many tokens."""
RESTARTS, RESTART_TOKENS, REMEMBERED = 8, 48, 300
"""Servers that start afresh, tokens that each decodes, activation matrices that it kept."""
REAL_KNOWN = 8
"""Requests of the real model's trace that restarts serve; the others' matrices were kept."""
SEED = 100


@dataclass(frozen=True, slots=True)
class Run:
    """One replay.

    Attributes:
        trace: what is routed.
        schedule: what runs when.
        prepare: is given the policy before the first step.
        first_step: steps before it are replayed and not counted.
    """

    trace: RoutingTrace
    schedule: Schedule
    prepare: Prepare | None = None
    first_step: int = 0


@dataclass(frozen=True, slots=True)
class Cell:
    """Replays whose hits are added up.

    Attributes:
        workload: of the table.
        name: tells the workload's cells apart.
        capacity: share of all experts that the cache holds.
        runs: see :class:`Run`.
        has_young: whether the first tokens of requests are a figure of their own.
    """

    workload: str
    name: str
    capacity: float
    runs: Sequence[Run]
    has_young: bool = False

    def rates(self, policy: str) -> tuple[float, float]:
        """Hit rate of everything, and of the first tokens of each request."""
        counted = [
            (run, replay_counted(run.trace, run.schedule, policy, self.capacity, run.prepare))
            for run in self.runs
        ]
        hits = sum(int(found.hits[run.first_step :].sum()) for run, found in counted)
        needs = sum(int(found.needs[run.first_step :].sum()) for run, found in counted)
        young = _added([found for _, found in counted])
        return hits / max(needs, 1), young


def _added(counted: Sequence[Counted]) -> float:
    needs = sum(found.young_needs for found in counted)
    return sum(found.young_hits for found in counted) / max(needs, 1)


def cut(trace: RoutingTrace, requests: slice, tokens: int) -> RoutingTrace:
    """Some requests of a trace, each ending after ``tokens`` tokens at the latest."""
    return replace(
        trace,
        starts=trace.starts[requests],
        lens=np.minimum(trace.lens[requests], tokens),
        names=trace.names[requests],
        prefill_lens=None if trace.prefill_lens is None else trace.prefill_lens[requests],
        schedule=None,
    )


def matrices(trace: RoutingTrace, requests: slice) -> Iterator[FloatArray]:
    """Activation matrices ``[layers, experts]`` of some requests."""
    layer = np.arange(trace.num_layers)[None, :, None]
    for start, length in zip(trace.starts[requests], trace.lens[requests], strict=True):
        counts = np.zeros((trace.num_layers, trace.num_experts), np.float32)
        ids = trace.ids[start : start + length]
        np.add.at(counts, (np.broadcast_to(layer, ids.shape), ids), 1.0)
        yield counts


def remembering(known: Sequence[FloatArray]) -> Prepare:
    """Fills the collection of ``trace`` as a file of it does at a start."""

    def prepare(policy: Policy) -> None:
        if isinstance(policy, TracePolicy):
            for counts in known:
                policy.forecast.collection.add(counts)

    return prepare


def gpt_oss(trace: RoutingTrace) -> Iterator[Cell]:
    """Long requests, and the same cut short."""
    for b, requests in GPT_OSS_REQUESTS.items():
        few = cut(trace, slice(requests), int(trace.lens.max()))
        runs = [Run(few, decode_schedule(few, b))]
        yield Cell("gpt-oss", f"B={b}", 0.25, runs)
    for b, requests in SHORT_REQUESTS.items():
        few = cut(trace, slice(requests), SHORT_TOKENS)
        yield Cell("gpt-oss, short", f"B={b}", 0.25, [Run(few, decode_schedule(few, b))], True)


def real(traces: Sequence[RoutingTrace]) -> Iterator[Cell]:
    """The recorded steps of the real model's server, prompts included."""
    for trace in traces:
        schedule = recorded_schedule(trace)
        b = max(len(schedule.tokens(step).requests) for step in range(schedule.num_steps))
        for capacity in (0.25, 0.5):
            name = f"real, B={b}"
            yield Cell(name, f"c={capacity:g}", capacity, [Run(trace, schedule)], True)


def alone(schedule: Schedule, request: int) -> Schedule:
    """The steps of one request, as if nobody else had been served."""
    tokens = np.flatnonzero(schedule.request == request)
    step_of_token = np.repeat(np.arange(schedule.num_steps), np.diff(schedule.offsets))
    _, starts = np.unique(step_of_token[tokens], return_index=True)
    return Schedule(
        offsets=np.append(starts, tokens.size).astype(np.int64),
        token=schedule.token[tokens],
        request=schedule.request[tokens],
        position=schedule.position[tokens],
        ended=[[] for _ in starts],
        prefill_ends=schedule.prefill_ends,
        last_ends=schedule.last_ends,
        is_draft=None if schedule.is_draft is None else schedule.is_draft[tokens],
    )


def restarts(trace: RoutingTrace, traces: Sequence[RoutingTrace]) -> Iterator[Cell]:
    """A request at a time on a server that just started, with what an earlier one kept."""
    few = cut(trace, slice(None), RESTART_TOKENS)
    prepare = remembering(list(matrices(trace, slice(RESTARTS, RESTARTS + REMEMBERED))))
    schedule = decode_schedule(few, 1, RESTARTS)
    runs = [Run(few, alone(schedule, request), prepare) for request in range(RESTARTS)]
    yield Cell("gpt-oss, restarts", "B=1", 0.25, runs, has_young=True)
    for one in traces[:1]:
        prepare = remembering(list(matrices(one, slice(REAL_KNOWN, None))))
        schedule = recorded_schedule(one)
        runs = [Run(one, alone(schedule, request), prepare) for request in range(REAL_KNOWN)]
        yield Cell("real, restarts", "B=1", 0.25, runs, has_young=True)


def synthetic() -> Iterator[Cell]:
    """Every made-up workload, four requests at a time where there are so many."""
    for name, (shape, structure) in SYNTHETIC.items():
        sizes = dict(zip(SHAPE_FIELDS, shape, strict=True))
        trace = synthetic_trace(seed=SEED, **sizes, **structure)
        b = 4 if trace.num_requests > 1 else 1
        runs = [Run(trace, decode_schedule(trace, b))]
        yield Cell("synthetic", name, 0.25, runs)


def shift() -> Iterator[Cell]:
    """What comes after a change of workload."""
    trace, first = shifted_trace(0)
    schedule = decode_schedule(trace, SHIFT_CONCURRENCY)
    runs = [Run(trace, schedule, first_step=first // SHIFT_CONCURRENCY)]
    yield Cell("shift", "after it", SHIFT_CAPACITY, runs)
