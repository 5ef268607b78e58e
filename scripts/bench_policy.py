"""What the ``trace`` policy itself costs: per layer call and per step, and where a GPU plans.

    python scripts/bench_policy.py [--quick]

Decode steps of several model sizes and batches on a cache of a quarter of all experts. The
layer call is ``observe`` (what serving waits for in every layer). The rest is ``catch_up``
(scores, learning), which serving does while it waits for a read, and ``end_step``.
Planning is ``bench_planner.py``'s. Medians and means of wall time; the mean shows the
successor model's refits, which are rare and long.

Where a GPU plans, the host has no part in layer calls. What it does before and behind a step's is
on the path of its launches (``launch``: whose token is whose, votes, queueing copies); what it
learns from the routing of the step before (``follow``: matrices) holds the interpreter meanwhile.
Tensors are on the CPU here, so the driver's share of a copy's launch is missing.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.harness.options import parser_of, results_of  # noqa: E402
from scripts.harness.report import Bar, write_report  # noqa: E402
from vllm_moe_offload.cache.planner import PLAN_INSTANT, CacheShape, ExpertCache  # noqa: E402
from vllm_moe_offload.device.followers import Followers  # noqa: E402
from vllm_moe_offload.device.runtime import DeviceRuntime  # noqa: E402
from vllm_moe_offload.policy.trace import TracePolicy  # noqa: E402
from vllm_moe_offload.step import StepTokens  # noqa: E402

SIZES = ((12, 16, 4, 1), (12, 16, 4, 8), (24, 32, 4, 8), (48, 128, 8, 1), (48, 128, 8, 32))
"""Layers, experts, top-k, requests."""
BARS_AT = (12, 16, 4, 8)
KINDS = 40
WARM_UP = 50


def _sample(size: tuple[int, int, int, int], times: dict[str, list[float]]) -> dict[str, Any]:
    """Figures of one size; ``times``: microseconds of each step."""
    kept = {name: np.array(values[WARM_UP:]) for name, values in times.items()}
    (steps,) = {len(values) for values in kept.values()}
    return {
        **dict(zip(("layers", "experts", "top_k", "requests"), size, strict=True)),
        "steps": steps,
        "median_us": {name: round(float(np.median(v)), 1) for name, v in kept.items()},
        "mean_us": {name: round(float(v.mean()), 1) for name, v in kept.items()},
        "max_us": {name: round(float(v.max()), 1) for name, v in kept.items()},
    }


def measure(layers: int, experts: int, top_k: int, requests: int, steps: int) -> dict[str, Any]:
    """Microseconds of one size."""
    generator = np.random.default_rng(0)
    policy = TracePolicy(layers, experts)
    shape = CacheShape(layers, experts, layers * experts // 4)
    cache = ExpertCache(shape, policy.rules, unbounded_staging=True)
    policy.bind(cache)
    taste = generator.normal(0.0, 1.2, (KINDS, layers, experts))
    times: dict[str, list[float]] = {"observe": [], "catch_up": [], "end_step": []}
    names = [str(index) for index in range(requests)]
    for step in range(steps):
        logits = taste[generator.integers(0, KINDS, requests)]
        logits = logits + generator.gumbel(size=logits.shape)
        ids = np.argpartition(-logits, top_k - 1, axis=2)[:, :, :top_k].astype(np.int32)
        ids = np.ascontiguousarray(ids.transpose(1, 0, 2))
        tokens = StepTokens.of_lengths(
            names,
            np.ones(requests, np.int64),
            np.full(requests, step),
            np.zeros(requests, np.bool_),
        )
        votes = [
            (np.bincount(layer_ids.ravel(), minlength=experts) / requests).astype(np.float32)
            for layer_ids in ids
        ]
        began = time.perf_counter()
        policy.begin_step(tokens)
        policy.catch_up()
        scored = time.perf_counter()
        observing = 0.0
        for layer in range(layers):
            called = time.perf_counter()
            policy.observe(layer, ids[layer], votes[layer])
            observing += time.perf_counter() - called
            cache.plan(layer, ids[layer], PLAN_INSTANT)
            cache.finish()
        planned = time.perf_counter()
        policy.end_step()
        ended = time.perf_counter()
        for name, seconds in zip(
            times, (observing / layers, scored - began, ended - planned), strict=True
        ):
            times[name].append(1e6 * seconds)
    return _sample((layers, experts, top_k, requests), times)


class Device:
    """Tensors of a device cache, and events that it passes when it is told to."""

    def __init__(self, layers: int, top_k: int, requests: int) -> None:
        self.live = torch.zeros(1, dtype=torch.int32)
        self.log = torch.zeros(requests, layers, top_k, dtype=torch.int16)
        self.counters = torch.zeros(2, dtype=torch.int64)
        self.has_passed = False

    def record_event(self) -> Device:
        return self

    def query(self) -> bool:
        return self.has_passed

    def synchronize(self) -> None:
        self.has_passed = True


def measure_device(
    layers: int, experts: int, top_k: int, requests: int, steps: int
) -> dict[str, Any]:
    """Microseconds of one size where a GPU plans."""
    generator = np.random.default_rng(0)
    device = Device(layers, top_k, requests)
    runtime = DeviceRuntime(
        device,
        Followers(TracePolicy(layers, experts)),
        num_layers=layers,
        num_slots=layers * experts // 4,
        expert_bytes=1,
        is_resident=False,
        record_event=device.record_event,
    )
    names = [str(index) for index in range(requests)]
    times: dict[str, list[float]] = {"launch": [], "follow": []}
    for step in range(steps):
        logits = generator.random((requests, layers, experts), np.float32)
        ids = np.argpartition(logits, top_k - 1, axis=2)[:, :, :top_k].astype(np.int16)
        device.log.copy_(torch.from_numpy(ids))
        device.has_passed = False
        began = time.perf_counter()
        runtime.begin_step(
            StepTokens.of_lengths(
                names,
                np.ones(requests, np.int64),
                np.full(requests, step),
                np.zeros(requests, np.bool_),
            )
        )
        runtime.after_forward()
        launched = time.perf_counter()
        device.has_passed = True
        runtime.arrivals.take_in()
        times["launch"].append(1e6 * (launched - began))
        times["follow"].append(1e6 * (time.perf_counter() - launched))
    return _sample((layers, experts, top_k, requests), times)


def main() -> int:
    """Measures all sizes; exit status 1 if a bar is missed."""
    args = parser_of(__doc__).parse_args()
    steps = WARM_UP + (20 if args.quick else 400)
    samples = []
    for size in SIZES:
        samples.append(measure(*size, steps=steps))
        print(samples[-1], flush=True)
    on_device = []
    for size in SIZES:
        on_device.append(measure_device(*size, steps=steps))
        print(on_device[-1], flush=True)
    launch = max(sample["median_us"]["launch"] for sample in on_device)
    follow = on_device[-1]["mean_us"]["follow"]
    at = samples[SIZES.index(BARS_AT)]["mean_us"]
    name = "{} layers x {} experts, top-{}, B={}".format(*BARS_AT)
    step_us = at["catch_up"] + at["end_step"]
    bars = [
        Bar(f"trace, layer call, {name}", at["observe"], 15.0, "us", at_least=False),
        Bar(f"trace, rest of a step, {name}", step_us, 1000.0, "us", at_least=False),
        Bar("a GPU plans, launch, most of all sizes", launch, 100.0, "us", at_least=False),
        Bar("a GPU plans, follow, 48 x 128, B=32", follow, 500.0, "us", at_least=False),
    ]
    body = {"samples": samples, "planned_by_gpu": on_device}
    write_report("policy_cost", body, bars=bars, results=results_of(args))
    return int(not all(bar.met for bar in bars))


if __name__ == "__main__":
    sys.exit(main())
