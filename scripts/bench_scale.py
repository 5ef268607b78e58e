"""Cost of matching, scoring and planning as experts, stored matrices and requests grow.

    python scripts/bench_scale.py [--quick]

The base case is Switch-Large's size: 30 layers of 2048 experts, top-1, 10,000 activation
matrices, 8 requests at a time, a cache of a quarter of all experts. Times are wall time per
decode step of everything that ``trace`` adds to a step: matching, scores, learning where the
model is small enough, planning, the collection's updates as requests end.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.harness.options import parser_of, results_of  # noqa: E402
from scripts.harness.report import Bar, write_report  # noqa: E402
from vllm_moe_offload.cache.planner import PLAN_INSTANT, CacheShape, ExpertCache  # noqa: E402
from vllm_moe_offload.policy.trace import TracePolicy  # noqa: E402
from vllm_moe_offload.step import StepTokens  # noqa: E402
from vllm_moe_offload.trace.collection import ActivationCollection  # noqa: E402

BASE = {"layers": 30, "experts": 2048, "entries": 10_000, "requests": 8, "top_k": 1}
VARIED: dict[str, tuple[int, ...]] = {
    "experts": (32, 128, 512, 2048),
    "entries": (100, 1000, 10_000),
    "requests": (1, 8, 32),
}
REQUEST_TOKENS = 96
KINDS = 200
EXPERTS_OF_A_KIND = 40


class Workload:
    """Requests of several kinds, each with its own experts in every layer."""

    def __init__(self, layers: int, experts: int, top_k: int) -> None:
        self.generator = np.random.default_rng(0)
        self.layers, self.experts, self.top_k = layers, experts, top_k
        shape = (KINDS, layers, min(EXPERTS_OF_A_KIND, experts))
        self.favourites = self.generator.integers(0, experts, shape)

    def matrix(self) -> np.ndarray:
        """Activation matrix ``[layers, experts]`` of a finished request."""
        kind = self.favourites[self.generator.integers(KINDS)]
        table = np.zeros((self.layers, self.experts), np.float32)
        picks = self.generator.integers(0, kind.shape[1], (self.layers, REQUEST_TOKENS))
        layer = np.arange(self.layers)[:, None]
        np.add.at(table, (layer, kind[layer, picks]), 1)
        return table

    def step(self, kinds: list[int]) -> np.ndarray:
        """Ids ``[layers, requests, top_k]`` of one token of each request."""
        width = self.favourites.shape[2]
        size = (len(kinds), self.layers, self.top_k)
        first = self.generator.integers(0, width, (*size[:2], 1))
        picks = (first + np.arange(self.top_k)) % width
        ids = np.take_along_axis(self.favourites[kinds], picks, axis=2)
        return np.ascontiguousarray(ids.transpose(1, 0, 2), dtype=np.int32)


class Step(NamedTuple):
    """One token of every request.

    Attributes:
        ids: ``[layers, requests, top_k]``.
        votes: share of the requests that want each expert, ``[layers, experts]``.
        rows: the requests.
        ended: requests that have just ended.
    """

    ids: np.ndarray
    votes: np.ndarray
    tokens: StepTokens
    ended: list[str]


class Batch:
    """Requests that run side by side; where one ends, another one follows."""

    def __init__(self, workload: Workload, requests: int) -> None:
        self.workload = workload
        self.running = [(f"r{index}", index % KINDS) for index in range(requests)]
        self.ends = {
            name: (index + 1) * REQUEST_TOKENS // requests
            for index, (name, _) in enumerate(self.running)
        }
        self.started = dict.fromkeys(self.ends, 0)

    def step(self, step: int) -> Step:
        """The next step; ``step`` counts them."""
        for index, (name, _) in enumerate(self.running):
            if step >= self.ends[name]:
                successor = f"{name.split('.')[0]}.{step}"
                kind = int(self.workload.generator.integers(KINDS))
                self.running[index] = (successor, kind)
                self.ends[successor] = step + REQUEST_TOKENS
                self.started[successor] = step
        ids = self.workload.step([kind for _, kind in self.running])
        names = [name for name, _ in self.running]
        count = len(names)
        rows = StepTokens.of_lengths(
            names,
            np.ones(count, np.int64),
            np.array([step - self.started[name] for name in names]),
            np.zeros(count, np.bool_),
        )
        ended = [name for name, end in self.ends.items() if end == step]
        return Step(ids, votes_of(ids, self.workload.experts), rows, ended)


def resident_bytes() -> int:
    """Peak resident set of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def votes_of(ids: np.ndarray, experts: int) -> np.ndarray:
    """Share of the rows that want each expert, ``[layers, experts]``."""
    layers, requests = ids.shape[:2]
    votes = np.zeros((layers, experts), np.float32)
    for row in range(requests):
        np.add.at(votes, (np.arange(layers)[:, None], ids[:, row]), 1 / requests)
    return votes


def time_step(policy: TracePolicy, cache: ExpertCache, step: Step) -> dict[str, float]:
    """Seconds of each part of a step, and of all of it."""
    began = time.perf_counter()
    for name in step.ended:
        policy.end_request(name)
    policy.begin_step(step.tokens)
    policy.catch_up()
    scored = time.perf_counter()
    for layer, ids in enumerate(step.ids):
        policy.observe(layer, ids, step.votes[layer])
        cache.plan(layer, ids, PLAN_INSTANT)
        cache.finish()
    planned = time.perf_counter()
    policy.end_step()
    done = time.perf_counter()
    return {
        "begin": scored - began,
        "layers": planned - scored,
        "end": done - planned,
        "step": done - began,
    }


def measure(
    *, layers: int, experts: int, entries: int, requests: int, top_k: int, steps: int
) -> dict[str, Any]:
    """Milliseconds per step of one size."""
    workload = Workload(layers, experts, top_k)
    policy = TracePolicy(layers, experts)
    policy.forecast.collection = ActivationCollection(layers, experts, entries)
    for _ in range(entries):
        policy.forecast.collection.add(workload.matrix())
    shape = CacheShape(layers, experts, layers * experts // 4)
    cache = ExpertCache(shape, policy.rules, unbounded_staging=True)
    policy.bind(cache)
    batch = Batch(workload, requests)
    samples = [time_step(policy, cache, batch.step(number)) for number in range(steps)]
    ms = {part: 1e3 * np.array([one[part] for one in samples]) for part in samples[0]}
    times = ms["step"][steps // 10 :]
    return {
        "layers": layers,
        "experts": experts,
        "entries": entries,
        "requests": requests,
        "top_k": top_k,
        "steps": steps,
        "mean_ms": round(float(times.mean()), 3),
        "median_ms": round(float(np.median(times)), 3),
        "p99_ms": round(float(np.percentile(times, 99)), 3),
        "mean_ms_of_parts": {
            part: round(float(np.mean(values)), 3) for part, values in ms.items()
        },
        "collection_bytes": policy.forecast.collection.nbytes,
        "peak_resident_bytes": resident_bytes(),
    }


def main() -> int:
    """Measures the base case first (its peak memory is the process's), then the others."""
    args = parser_of(__doc__).parse_args()
    steps = 50 if args.quick else 600
    base = dict(BASE, entries=200) if args.quick else dict(BASE)
    samples = [measure(**base, steps=steps)]
    print(samples[0], flush=True)
    for name, values in VARIED.items():
        for value in values:
            size = base | {name: min(value, base["entries"]) if name == "entries" else value}
            if size != base:
                samples.append(measure(**size, steps=steps))
                print(samples[-1], flush=True)
    first = samples[0]
    bars = [
        Bar("match + score + plan, mean", first["mean_ms"], 2.0, "ms", at_least=False),
        Bar("match + score + plan, p99", first["p99_ms"], 10.0, "ms", at_least=False),
        Bar("peak memory", first["peak_resident_bytes"] / 1e9, 1.0, "GB", at_least=False),
    ]
    data = {"parameters": base, "samples": samples}
    write_report("scale", data, bars=bars, results=results_of(args))
    return int(not all(bar.met for bar in bars))


if __name__ == "__main__":
    sys.exit(main())
