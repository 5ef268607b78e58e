"""Hit rates of all policies on a routing trace, and what each part of ``trace`` brings.

    python scripts/bench_replay.py TRACE.npz [--quick] [--only table|ablation|synthetic|shift|prefill]

Table: every policy in every cell of capacity and concurrency (the first 100 requests at
concurrency 1 and 4, all of them above). Ablation: ``trace`` with one part removed at a time.
Synthetic: models of other shapes and workloads of other structure, short traces, where
``trace`` must not lose either. Shift: hit rates before, at and after a change of workload.
Prefill: a request's decode hit rates before and after a neighbour's long prefill.
The seconds are CPU time of one thread (run with OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.bench_report import Bar, add_common_options, results_of, write_report  # noqa: E402
from scripts.synthetic_trace import synthetic_trace  # noqa: E402
from vllm_moe_offload.cache import PLAN_INSTANT, CacheShape, ExpertCache  # noqa: E402
from vllm_moe_offload.policy import StepRows, TracePolicy, make_policy  # noqa: E402
from vllm_moe_offload.policy.base import PlannerRules  # noqa: E402
from vllm_moe_offload.replay import plan_waves, replay  # noqa: E402
from vllm_moe_offload.shadow import bind_policy  # noqa: E402
from vllm_moe_offload.trace.routing import RoutingTrace, load_trace  # noqa: E402

PLAIN = ("lru", "lru-layer", "lfu", "lrfu")
POLICIES = (*PLAIN, "lrfu:half_life=32", "eamc", "trace", "belady")
CAPACITIES = (0.125, 0.25, 0.5)
CONCURRENCIES = (1, 4, 8, 32)
FEW_REQUESTS = 100
ABLATION_CELLS = ((1, 0.25), (4, 0.25), (8, 0.25))
ABLATION = {
    "complete": "trace",
    "without the successor model": "trace:value=0",
    "without own history": "trace:history=0",
    "without the slow history": "trace:slow_history=0",
    "without popularity": "trace:popularity=0",
    "without the collection's prior": "trace:prior=0",
    "without the distance to the next visit": "trace:distance_weight=0",
    "without shadows": "trace:fallback=0",
    "without following within a step": "trace:follow=0",
}
TARGETS = {
    (1, 0.125): 0.452,
    (1, 0.25): 0.685,
    (1, 0.5): 0.921,
    (4, 0.125): 0.268,
    (4, 0.25): 0.487,
    (4, 0.5): 0.808,
    (8, 0.125): 0.211,
    (8, 0.25): 0.410,
    (8, 0.5): 0.743,
    (32, 0.25): 0.302,
}
"""What ``trace`` must reach on the gpt-oss-20b trace."""
NEVER_LOSES_BY = 0.003
SPEED_CELL = (8, 0.25)
PLAIN_SECONDS = 60.0
TRACE_SLOWER = 5.0
"""The whole trace by all plain policies together, and how much slower ``trace`` may be."""
SHAPE_FIELDS = ("layers", "experts", "top_k", "requests", "tokens")
INDEPENDENT = {"topic_spread": 0.0, "kind_spread": 0.0}
SYNTHETIC: dict[str, tuple[tuple[int, ...], dict[str, float]]] = {
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
SHIFT_REQUESTS = 24
SHIFT_TOKENS = 60
SHIFT_CONCURRENCY = 2
SHIFT_CAPACITY = 0.25
RECOVERED = 0.95
"""Share of the gain from the first requests of a new workload to its last ones at which a
policy counts as recovered."""

Log = Callable[[str], None]


PREFILL_AT, PREFILL_SEEN, PREFILL_TOKENS = 96, 16, 512
"""A neighbour's prompt of so many tokens after so many tokens of a request; hit rates of the
so many tokens before and after it."""
PREFILL_MAY_COST = 0.05


def log(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


def measure(
    trace: RoutingTrace, policy: str, capacity: float, concurrency: int, requests: int | None
) -> dict[str, Any]:
    """One cell: the replay's figures and its CPU seconds."""
    began = time.process_time()
    result = replay(trace, policy, capacity, concurrency, num_requests=requests)
    seconds = time.process_time() - began
    log(f"B={concurrency} c={capacity:g} {policy}: {result.hit_rate:.4f} in {seconds:.1f} s")
    return {**result.as_dict(), "cpu_seconds": round(seconds, 2)}


def requests_at(trace: RoutingTrace, concurrency: int, quick: bool) -> int | None:
    """How many requests a cell replays."""
    if quick:
        return min(4, trace.num_requests)
    return min(FEW_REQUESTS, trace.num_requests) if concurrency < 8 else None


def table(trace: RoutingTrace, quick: bool) -> list[dict[str, Any]]:
    """Every policy in every cell."""
    return [
        measure(trace, policy, capacity, b, requests_at(trace, b, quick))
        for b in CONCURRENCIES
        for capacity in CAPACITIES
        for policy in POLICIES
    ]


def ablation(trace: RoutingTrace, quick: bool) -> list[dict[str, Any]]:
    """``trace`` without one part at a time."""
    rows = []
    for b, capacity in ABLATION_CELLS:
        requests = requests_at(trace, b, quick)
        for part, spec in ABLATION.items():
            rows.append({"part": part, **measure(trace, spec, capacity, b, requests)})
        with mock.patch.object(TracePolicy, "rules", PlannerRules(admission=False)):
            measured = measure(trace, "trace", capacity, b, requests)
        rows.append({"part": "without admission", **measured})
    return rows


def synthetic(seeds: int) -> list[dict[str, Any]]:
    """``trace`` against the best plain policy on made-up traces.

    ``standard_error`` is that of the margin over the steps of one trace.
    """
    found = []
    for name, (shape, structure) in SYNTHETIC.items():
        for seed in range(100, 100 + seeds):
            sizes = dict(zip(SHAPE_FIELDS, shape, strict=True))
            trace = synthetic_trace(seed=seed, **sizes, **structure)
            for b in (b for b in CONCURRENCIES if b == 1 or b < 2 * trace.num_requests):
                for capacity in CAPACITIES:
                    rates, steps = {}, {}
                    for policy in (*PLAIN, "trace", "belady"):
                        timeline: list[tuple[int, int]] = [(0, 0)]
                        result = replay(trace, policy, capacity, b, timeline=timeline)
                        rates[policy] = result.hit_rate
                        steps[policy] = np.diff(np.array(timeline)[:, 0])
                    best = max(PLAIN, key=rates.__getitem__)
                    lead = steps["trace"] - steps[best]
                    error = lead.std() * lead.size**0.5 / (result.hits + result.misses)
                    cell = {"trace": name, "seed": seed, "concurrency": b, "capacity": capacity}
                    figures = {"margin": margin(rates), "standard_error": float(error)}
                    found.append({**cell, **figures, "hit_rates": rates})
        log(f"synthetic: {name} done")
    return found


def shifted_trace(seed: int) -> tuple[RoutingTrace, int]:
    """Requests of one workload, then as many of another; and the first token of those."""
    before, after = (
        synthetic_trace(
            layers=6,
            requests=SHIFT_REQUESTS,
            tokens=SHIFT_TOKENS,
            topics=2,
            seed=2 * seed + part,
        )
        for part in (0, 1)
    )
    starts = np.concatenate([before.starts, after.starts + len(before.ids)])
    both = RoutingTrace(
        ids=np.concatenate([before.ids, after.ids]),
        starts=starts,
        lens=np.concatenate([before.lens, after.lens]),
        num_experts=before.num_experts,
    )
    return both, len(before.ids)


def shift(seeds: int) -> list[dict[str, Any]]:
    """Hit rates around a change of workload: every expert's popularity is drawn anew.

    ``before`` is that of the last ten requests of the old workload, ``right_after`` that of
    the new one's first ten steps, ``after`` those of each pair of its requests in turn.
    ``recovered_after_requests``: requests of the new workload until a pair reached
    :data:`RECOVERED` of what the second half of them reach.
    """
    found = []
    pair = SHIFT_CONCURRENCY * SHIFT_TOKENS  # tokens
    for seed in range(seeds):
        trace, first = shifted_trace(seed)
        for policy in (*PLAIN, "trace"):
            timeline: list[tuple[int, int]] = [(0, 0)]
            replay(trace, policy, SHIFT_CAPACITY, SHIFT_CONCURRENCY, timeline=timeline)
            totals = np.array(timeline)

            def rate(begin: int, end: int, totals: np.ndarray = totals) -> float:
                """Hit rate of the steps that compute the tokens ``[begin, end)``."""
                steps = np.array([begin, end]) // SHIFT_CONCURRENCY
                low, high = totals[np.minimum(steps, len(totals) - 1)]
                return float((high - low)[0] / max((high - low).sum(), 1))

            after = [rate(at, at + pair) for at in range(first, len(trace.ids) - pair, pair)]
            settled = float(np.mean(after[len(after) // 2 :]))
            recovered = next(i for i, value in enumerate(after) if value >= RECOVERED * settled)
            row = {
                "policy": policy,
                "seed": seed,
                "before": rate(first - 5 * pair, first),
                "right_after": rate(first, first + 10 * SHIFT_CONCURRENCY),
                "after": after,
                "settled": settled,
                "recovered_after_requests": SHIFT_CONCURRENCY * (recovered + 1),
            }
            log(f"shift: {row}")
            found.append(row)
    return found


def bars_of_shift(rows: list[dict[str, Any]]) -> list[Bar]:
    """``trace`` recovers within tens of requests, and to no less than the best plain policy."""
    mine = [row for row in rows if row["policy"] == "trace"]
    slowest = max(row["recovered_after_requests"] for row in mine)
    margins = [
        row["settled"]
        - max(
            other["settled"] for other in rows if other["seed"] == row["seed"] and other != row
        )
        for row in mine
    ]
    return [
        Bar("shift: requests until recovered, slowest", slowest, 20, at_least=False),
        Bar("shift: settled, trace - best plain, worst", min(margins), -NEVER_LOSES_BY),
    ]


def prefill(trace: RoutingTrace, pairs: int) -> list[dict[str, Any]]:
    """Decode hit rates of a request around the prefill of a neighbour, per policy.

    A request decodes :data:`PREFILL_AT` tokens; then another one reads a prompt of
    :data:`PREFILL_TOKENS` tokens (routed as other requests' tokens are) in one step, and ends;
    the first goes on. A quarter of all experts is cached.
    """
    rows = []
    for policy in (*PLAIN, "trace"):
        hits = np.zeros((2, 2), np.int64)  # before, after: hits, needs
        for pair in range(pairs):
            hits += _around_prefill(trace, policy, pair)
        before, after = (hits[:, 0] / hits[:, 1]).tolist()
        rows.append({"policy": policy, "pairs": pairs, "before": before, "after": after})
        log(f"prefill {policy}: {before:.3f} before, {after:.3f} after")
    return rows


def _around_prefill(trace: RoutingTrace, name: str, pair: int) -> np.ndarray:
    """Hits and needs of ``a``'s decode steps just before and just after, ``[2, 2]``."""
    layers, experts = trace.num_layers, trace.num_experts
    policy = make_policy(name, layers, experts)
    shape = CacheShape(layers, experts, layers * experts // 4)
    cache = ExpertCache(shape, policy.rules, unbounded_staging=True)
    bind_policy(policy, cache)
    long_enough = np.flatnonzero(trace.lens >= PREFILL_AT + PREFILL_SEEN)
    mine = int(trace.starts[long_enough[pair % long_enough.size]])
    generator = np.random.default_rng(pair)
    prompt = generator.integers(0, trace.ids.shape[0] - PREFILL_TOKENS)
    found = np.zeros((2, 2), np.int64)

    def step(tokens: np.ndarray, rows: StepRows) -> tuple[int, int]:
        ids = np.ascontiguousarray(trace.ids[tokens].transpose(1, 0, 2), np.int32)
        before = cache.count("hits"), cache.count("misses")
        policy.begin_step(rows)
        for layer in range(layers):
            votes = np.zeros(experts, np.float32)
            np.add.at(votes, ids[layer], rows.weights[:, None])
            policy.observe(layer, ids[layer], votes)
            plan_waves(cache, policy, layer, ids[layer], PLAN_INSTANT)
        policy.end_step()
        hits = cache.count("hits") - before[0]
        return hits, hits + cache.count("misses") - before[1]

    def rows_of(names: list[str], lengths: list[int], first: list[int]) -> StepRows:
        is_prefill = np.array([name == "b" for name in names])
        return StepRows.of_lengths(names, np.array(lengths), np.array(first), is_prefill)

    for position in range(PREFILL_AT):
        counted = step(np.array([mine + position]), rows_of(["a"], [1], [position]))
        if position >= PREFILL_AT - PREFILL_SEEN:
            found[0] += counted
    tokens = np.append(mine + PREFILL_AT, prompt + np.arange(PREFILL_TOKENS))
    step(tokens, rows_of(["a", "b"], [1, PREFILL_TOKENS], [PREFILL_AT, 0]))
    policy.end_request("b")
    for position in range(PREFILL_AT + 1, PREFILL_AT + PREFILL_SEEN):
        found[1] += step(np.array([mine + position]), rows_of(["a"], [1], [position]))
    return found


def bars_of_prefill(rows: list[dict[str, Any]]) -> list[Bar]:
    """Decode keeps its experts under ``trace``."""
    lost = {row["policy"]: row["before"] - row["after"] for row in rows}
    name = "prefill: decode hit rate lost to a neighbour's prompt, trace"
    return [Bar(name, lost["trace"], PREFILL_MAY_COST, at_least=False)]


def margin(rates: dict[str, float]) -> float:
    """How far ``trace`` lies above the best plain policy."""
    return rates["trace"] - max(rates[policy] for policy in PLAIN)


def bars_of_table(rows: list[dict[str, Any]]) -> list[Bar]:
    """Targets of the cells, and the greatest loss anywhere."""
    bars, margins = [], []
    for b in CONCURRENCIES:
        for capacity in CAPACITIES:
            rates = {
                row["policy"]: row["hit_rate"]
                for row in rows
                if row["concurrency"] == b and row["capacity"] == capacity
            }
            margins.append(margin(rates))
            target = TARGETS.get((b, capacity))
            if target is not None:
                bars.append(Bar(f"trace, B={b}, c={capacity:g}", rates["trace"], target))
    bars.append(Bar("trace - best plain, worst cell", min(margins), -NEVER_LOSES_BY))
    seconds = {
        row["policy"]: row["cpu_seconds"]
        for row in rows
        if (row["concurrency"], row["capacity"]) == SPEED_CELL
    }
    plain = sum(seconds[policy] for policy in PLAIN)
    cell = "B={}, c={:g}".format(*SPEED_CELL)
    bars.append(Bar(f"all plain policies, {cell}", plain, PLAIN_SECONDS, "s", at_least=False))
    slower = seconds["trace"] / plain
    bars.append(
        Bar(f"trace / all plain policies, {cell}", slower, TRACE_SLOWER, "x", at_least=False)
    )
    return bars


def main() -> int:
    """Runs the parts asked for; exit status 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", help="routing trace; the bars are those of gpt-oss-20b's")
    parser.add_argument(
        "--only", choices=["table", "ablation", "synthetic", "shift", "prefill"]
    )
    parser.add_argument("--seeds", type=int, default=3, help="of every synthetic trace")
    add_common_options(parser)
    args = parser.parse_args()
    trace = load_trace(args.trace)
    bars: list[Bar] = []

    def report(part: str, rows: list[dict[str, Any]], bars: list[Bar]) -> None:
        parameters = {"trace": Path(args.trace).name, "requests": trace.num_requests}
        write_report(
            f"replay_{part}",
            {"parameters": parameters, "samples": rows},
            bars=bars,
            results=results_of(args),
        )

    if args.only in (None, "synthetic"):
        rows = synthetic(1 if args.quick else args.seeds)
        worst = min(margin(row["hit_rates"]) for row in rows)
        bars.append(Bar("synthetic: trace - best plain, worst cell", worst, -NEVER_LOSES_BY))
        report("synthetic", rows, bars[-1:])
    if args.only in (None, "shift"):
        rows = shift(1 if args.quick else args.seeds)
        shift_bars = bars_of_shift(rows)
        bars += shift_bars
        report("shift", rows, shift_bars)
    if args.only in (None, "prefill"):
        rows = prefill(trace, 4 if args.quick else 40)
        prefill_bars = bars_of_prefill(rows)
        bars += prefill_bars
        report("prefill", rows, prefill_bars)
    if args.only in (None, "ablation"):
        report("ablation", ablation(trace, args.quick), [])
    if args.only in (None, "table"):
        rows = table(trace, args.quick)
        table_bars = [] if args.quick else bars_of_table(rows)
        bars += table_bars
        report("table", rows, table_bars)
    return int(not all(bar.met for bar in bars))


if __name__ == "__main__":
    sys.exit(main())
