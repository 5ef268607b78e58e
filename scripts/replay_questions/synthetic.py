"""``trace`` against the best plain policy on made-up traces."""

from __future__ import annotations

from typing import Any

import numpy as np

from scripts.harness.report import Bar
from scripts.replay_questions.cells import (
    CAPACITIES,
    CONCURRENCIES,
    NEVER_LOSES_BY,
    PLAIN,
    Row,
    log,
    margin,
)
from scripts.synthetic_trace import synthetic_trace
from vllm_moe_offload.replay.run import replay
from vllm_moe_offload.trace.routing import RoutingTrace

SHAPE_FIELDS = ("layers", "experts", "top_k", "requests", "tokens")
INDEPENDENT = {"topic_spread": 0.0, "kind_spread": 0.0}
SYNTHETIC: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "64 experts, top-8, one request": ((12, 64, 8, 1, 250), {}),
    "256 experts, top-8, one request": ((8, 256, 8, 1, 250), {}),
    "64 experts, top-8, six requests": ((12, 64, 8, 6, 45), {}),
    "256 experts, top-8, six requests": ((8, 256, 8, 6, 45), {}),
    "8 experts, top-2, one request": ((6, 8, 2, 1, 250), {}),
    "128 experts, top-8, twenty requests": ((8, 128, 8, 20, 60), {}),
    "independent tokens": ((12, 64, 8, 6, 45), INDEPENDENT),
    "cycle of kinds, one request": ((12, 64, 8, 1, 250), {"sequence": 0.9}),
    "cycle of kinds, six requests": ((12, 64, 8, 6, 45), {"sequence": 0.9}),
    "long runs of a kind, one request": ((12, 64, 8, 1, 250), {"stickiness": 0.9}),
    "drifting popularity": ((12, 64, 8, 6, 45), {"drift": 0.1}),
}
"""Layers, experts, top-k, requests, tokens; and what differs from the usual structure."""


def synthetic(seeds: int) -> list[Row]:
    """Every made-up workload, with several seeds, in every cell that it can fill."""
    found = []
    for name, (shape, structure) in SYNTHETIC.items():
        for seed in range(100, 100 + seeds):
            sizes: dict[str, Any] = dict(zip(SHAPE_FIELDS, shape, strict=True))
            trace = synthetic_trace(seed=seed, **sizes, **structure)
            for b in (b for b in CONCURRENCIES if b == 1 or b < 2 * trace.num_requests):
                for capacity in CAPACITIES:
                    cell = {"trace": name, "seed": seed, "concurrency": b, "capacity": capacity}
                    found.append(cell | compare(trace, capacity, b))
        log(f"synthetic: {name} done")
    return found


def compare(trace: RoutingTrace, capacity: float, concurrency: int) -> Row:
    """Hit rates in one cell and the margin of ``trace``.

    ``standard_error`` is that of the margin over the steps of one trace.
    """
    rates, steps, needs = {}, {}, 0
    for policy in (*PLAIN, "trace", "belady"):
        timeline: list[tuple[int, int]] = [(0, 0)]
        result = replay(trace, policy, capacity, concurrency, timeline=timeline)
        rates[policy] = result.hit_rate
        steps[policy] = np.diff(np.array(timeline)[:, 0])
        needs = result.hits + result.misses
    best = max(PLAIN, key=rates.__getitem__)
    lead = steps["trace"] - steps[best]
    error = float(lead.std() * lead.size**0.5 / needs)
    return {"margin": margin(rates), "standard_error": error, "hit_rates": rates}


def bars_of(rows: list[Row]) -> list[Bar]:
    """The greatest loss anywhere."""
    worst = min(margin(row["hit_rates"]) for row in rows)
    return [Bar("synthetic: trace - best plain, worst cell", worst, -NEVER_LOSES_BY)]
