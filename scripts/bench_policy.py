"""What the ``trace`` policy itself costs: per layer call and per step.

    python scripts/bench_policy.py [--quick]

Decode steps of several model sizes and batches on a cache of a quarter of all experts. The
layer call is ``observe`` (what serving waits for in every layer). The rest is ``catch_up``
(scores, learning), which serving does while it waits for a read, and ``end_step``.
Planning is ``bench_planner.py``'s. Medians and means of wall time; the mean shows the
successor model's refits, which are rare and long.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.harness.options import parser_of, results_of  # noqa: E402
from scripts.harness.report import Bar, write_report  # noqa: E402
from vllm_moe_offload.cache.planner import PLAN_INSTANT, CacheShape, ExpertCache  # noqa: E402
from vllm_moe_offload.policy.trace import TracePolicy  # noqa: E402
from vllm_moe_offload.step import StepTokens  # noqa: E402

SIZES = ((12, 16, 4, 1), (12, 16, 4, 8), (24, 32, 4, 8), (48, 128, 8, 1), (48, 128, 8, 32))
"""Layers, experts, top-k, requests."""
BARS_AT = (12, 16, 4, 8)
KINDS = 40
WARM_UP = 50


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
    kept = {name: np.array(values[WARM_UP:]) for name, values in times.items()}
    return {
        "layers": layers,
        "experts": experts,
        "top_k": top_k,
        "requests": requests,
        "steps": steps - WARM_UP,
        "median_us": {name: round(float(np.median(v)), 1) for name, v in kept.items()},
        "mean_us": {name: round(float(v.mean()), 1) for name, v in kept.items()},
        "max_us": {name: round(float(v.max()), 1) for name, v in kept.items()},
    }


def main() -> int:
    """Measures all sizes; exit status 1 if a bar is missed."""
    args = parser_of(__doc__).parse_args()
    steps = WARM_UP + (20 if args.quick else 400)
    samples = []
    for size in SIZES:
        samples.append(measure(*size, steps=steps))
        print(samples[-1], flush=True)
    at = samples[SIZES.index(BARS_AT)]["mean_us"]
    name = "{} layers x {} experts, top-{}, B={}".format(*BARS_AT)
    step_us = at["catch_up"] + at["end_step"]
    bars = [
        Bar(f"trace, layer call, {name}", at["observe"], 15.0, "us", at_least=False),
        Bar(f"trace, rest of a step, {name}", step_us, 1000.0, "us", at_least=False),
    ]
    write_report("policy_cost", {"samples": samples}, bars=bars, results=results_of(args))
    return int(not all(bar.met for bar in bars))


if __name__ == "__main__":
    sys.exit(main())
