"""Replay by the rules: schedules, counts against a plain reference, recorded steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scripts.synthetic_trace import synthetic_trace
from tests.reference_planner import ReferencePlanner
from vllm_moe_offload.cache.planner import CacheShape, ExpertCache
from vllm_moe_offload.policy import make_policy
from vllm_moe_offload.replay.run import capacity_slots, replay, replay_recorded
from vllm_moe_offload.replay.schedule import ReplayError, decode_schedule, recorded_schedule
from vllm_moe_offload.step import StepTokens
from vllm_moe_offload.trace.recorder import TraceRecorder
from vllm_moe_offload.trace.routing import RoutingTrace, load_trace


def tiny_trace(*lens: int, layers: int = 1, experts: int = 4, top_k: int = 1) -> RoutingTrace:
    generator = np.random.default_rng(0)
    sizes = np.array(lens, np.int64)
    shape = (int(sizes.sum()), layers)
    ids = np.stack(
        [generator.permuted(np.arange(experts))[:top_k] for _ in range(shape[0] * layers)]
    )
    return RoutingTrace(
        ids=ids.reshape(*shape, top_k).astype(np.uint8),
        starts=np.cumsum(sizes) - sizes,
        lens=sizes,
        num_experts=experts,
    )


def requests_by_step(trace: RoutingTrace, concurrency: int, count: int | None = None) -> list:
    schedule = decode_schedule(trace, concurrency, count)
    return [
        list(zip(map(int, tokens.requests), tokens.positions.tolist(), strict=True))
        for tokens in map(schedule.tokens, range(schedule.num_steps))
    ]


def test_a_request_that_ends_is_followed_at_the_next_step() -> None:
    assert requests_by_step(tiny_trace(2, 3, 1, 1), 2) == [
        [(0, 0), (1, 0)],
        [(0, 1), (1, 1)],
        [(1, 2), (2, 0)],
        [(3, 0)],
    ]


def test_ends_are_told_before_the_next_step() -> None:
    schedule = decode_schedule(tiny_trace(2, 3, 1), 2)
    assert schedule.ended == [[], [], [0]]


def test_only_the_first_requests() -> None:
    assert requests_by_step(tiny_trace(1, 1, 1), 1, 2) == [[(0, 0)], [(1, 0)]]


def test_empty_requests_are_skipped() -> None:
    assert requests_by_step(tiny_trace(0, 2, 0, 1), 2) == [[(1, 0), (3, 0)], [(1, 1)]]


def test_prompts_are_marked() -> None:
    trace = synthetic_trace(requests=1, tokens=3, prompt=2, seed=1)
    schedule = decode_schedule(trace, 1)
    flags = [bool(schedule.tokens(step).is_prefill[0]) for step in range(schedule.num_steps)]
    assert flags[:3] == [True, True, False]


def reference_hits(trace: RoutingTrace, policy: str, slots: int, concurrency: int) -> int:
    """Hits by ReferencePlanner and scores in Python floats, token by token."""
    layers, experts = trace.num_layers, trace.num_experts
    planner = ReferencePlanner(
        layers,
        experts,
        slots,
        experts,
        recency=policy.startswith("lru"),
        per_layer=policy == "lru-layer",
        admission=policy == "lrfu",
    )
    schedule = decode_schedule(trace, concurrency)
    for step in range(schedule.num_steps):
        tokens = schedule.token[schedule.offsets[step] : schedule.offsets[step + 1]]
        for layer in range(layers):
            chosen = trace.ids[tokens, layer].ravel().tolist()
            for expert in range(experts):
                score = planner.scores.get((layer, expert), 0.0)
                if policy == "lrfu":
                    score = score * 2 ** (-1 / 8) + chosen.count(expert) / len(tokens)
                elif policy == "lfu":
                    score += expert in chosen
                planner.scores[layer, expert] = score
            planner.plan(layer, chosen, instant=True)
            planner.finish()
    return planner.counters["hits"]


@pytest.mark.parametrize("concurrency", [1, 2, 4])  # powers of two: votes are exact
@pytest.mark.parametrize("policy", ["lru", "lru-layer", "lfu", "lrfu"])
def test_plain_policies_count_what_a_reference_counts(policy: str, concurrency: int) -> None:
    trace = synthetic_trace(layers=3, experts=12, top_k=3, requests=4, tokens=25, seed=3)
    result = replay(trace, policy, 0.3, concurrency)
    assert result.hits == reference_hits(trace, policy, int(0.3 * 36), concurrency)


def test_capacity_is_a_share_rounded_down() -> None:
    assert capacity_slots(0.25, 3, 7) == 5
    assert capacity_slots(1.0, 3, 7) == 21


@pytest.mark.parametrize(
    ("capacity", "concurrency", "requests", "message"),
    [
        (0.0, 1, None, r"capacity must lie in \(0, 1\], got 0"),
        (1.2, 1, None, r"capacity must lie in \(0, 1\], got 1.2"),
        (0.5, 0, None, "concurrency must be at least 1, got 0"),
        (0.5, 1, 9, "between 1 and the trace's 2, got 9"),
        (0.5, 1, 0, "between 1 and the trace's 2, got 0"),
    ],
)
def test_wrong_parameters(capacity, concurrency, requests, message) -> None:
    with pytest.raises(ReplayError, match=message):
        replay(tiny_trace(1, 1), "lru", capacity, concurrency, num_requests=requests)


def test_progress_covers_every_token() -> None:
    trace = tiny_trace(3, 2, 4)
    done: list[int] = []
    replay(trace, "lru", 0.5, 2, progress=done.append)
    assert sum(done) == 9


class Server:
    """What a server does with a cache and a recorder, with reads that end at once."""

    def __init__(self, path: Path, policy: str, slots: int, staging: int) -> None:
        self.layers, self.experts = 3, 16
        self.cache = ExpertCache(
            CacheShape(self.layers, self.experts, slots, staging),
            (chosen := make_policy(policy, self.layers, self.experts)).rules,
        )
        self.policy = chosen
        self.policy.bind(self.cache)
        self.recorder = TraceRecorder(
            path,
            num_layers=self.layers,
            num_experts=self.experts,
            top_k=2,
            num_slots=slots,
            num_staging_slots=staging,
            limit_bytes=1 << 24,
        )

    def step(self, tokens: StepTokens, ids: np.ndarray) -> None:
        self.policy.begin_step(tokens)
        self.recorder.begin_step(tokens)
        for layer, layer_ids in enumerate(ids):
            votes = np.zeros(self.experts, np.float32)
            for row, chosen in enumerate(layer_ids):
                for expert in chosen:
                    votes[expert] += tokens.weights[row]
            self.policy.observe(layer, layer_ids, votes)
            self.recorder.observe(layer, layer_ids)
            self.call(layer, layer_ids)
        self.policy.end_step()
        self.recorder.end_step()

    def call(self, layer: int, ids: np.ndarray) -> None:
        if self.cache.plan(layer, ids):
            self.read_and_finish()
            return
        needed = np.unique(ids).astype(np.int32)
        resident = self.cache.page_table[layer, needed] >= 0
        order = np.concatenate([needed[resident], needed[~resident]])
        for begin in range(0, order.size, self.cache.shape.num_pool_slots):
            wave = order[begin : begin + self.cache.shape.num_pool_slots].copy()
            assert self.cache.plan(layer, wave)
            self.read_and_finish()

    def read_and_finish(self) -> None:
        if self.cache.outcome.num_misses:
            self.policy.catch_up()
        for row in self.cache.misses[1].tolist():
            self.cache.complete(row, True)
        self.cache.finish()

    def verify(self, ends: dict[str, int]) -> None:
        self.policy.verify(ends)
        self.recorder.verify(ends)

    def end(self, request: str) -> None:
        self.policy.end_request(request)
        self.recorder.end_request(request)


@pytest.mark.parametrize("slots", [5, 12, 30])
@pytest.mark.parametrize("policy", ["lru", "lfu", "lrfu", "trace"])
@pytest.mark.parametrize("most_drafted", [0, 3])
def test_a_recorded_trace_replays_to_what_the_server_counted(
    tmp_path: Path, policy: str, slots: int, most_drafted: int
) -> None:
    server = Server(tmp_path / "trace.npz", policy, slots, 4)
    generator = np.random.default_rng(slots)
    running: dict[str, int] = {}
    reached: dict[str, int] = {}  # whatever was preempted since
    prompts: dict[str, int] = {}
    for count in range(150):
        if len(running) < 4 and generator.random() < 0.3:
            running[f"r{count}"] = 0
            prompts[f"r{count}"] = int(generator.integers(1, 12))
        ended = [name for name in running if generator.random() < 0.05]
        preempted = [name for name in running if generator.random() < 0.03]
        for name in preempted:
            running[name] = 0
        scheduled = [name for name in running if generator.random() < 0.8 and name not in ended]
        if not scheduled:
            continue
        server.verify(
            {name: reached.get(name, 0) for name in ended} | {n: running[n] for n in scheduled}
        )
        for name in ended:
            server.end(name)
            del running[name]
        generator.shuffle(scheduled)
        lengths = [
            int(min(prompts[name] - running[name], 6)) if running[name] < prompts[name] else 1
            for name in scheduled
        ]
        first = np.array([running[name] for name in scheduled])
        is_prefill = np.array([running[name] < prompts[name] for name in scheduled])
        drafted = np.where(is_prefill, 0, generator.integers(0, most_drafted + 1, first.size))
        drafted = drafted.astype(np.int32)
        lengths = [length + int(more) for length, more in zip(lengths, drafted, strict=True)]
        rows = StepTokens.of_lengths(scheduled, np.array(lengths), first, is_prefill, drafted)
        centre = generator.integers(0, 16, (3, sum(lengths), 1))
        ids = (centre + np.array([0, 3])) % 16
        server.step(rows, ids.astype(np.int32))
        for name, length, more in zip(scheduled, lengths, drafted, strict=True):
            running[name] += length - int(generator.integers(0, more + 1))
            reached[name] = max(reached.get(name, 0), running[name])
    server.recorder.close()
    result = replay_recorded(load_trace(tmp_path / "trace.npz"), policy)
    assert (result.hits, result.misses) == (
        server.cache.count("hits"),
        server.cache.count("misses"),
    )
    assert result.concurrency is None


def test_a_trace_without_schedule_says_so() -> None:
    with pytest.raises(ReplayError, match="carries no schedule"):
        recorded_schedule(tiny_trace(2))
    with pytest.raises(ReplayError, match="carries no schedule"):
        replay_recorded(tiny_trace(2), "lru")
