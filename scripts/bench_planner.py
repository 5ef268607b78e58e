"""Planning and remapping when every expert hits: microseconds per layer call.

Drives the runtime as the layers do (begin_layer, end_layer), without kernel, store or vLLM:
every expert that the routing names is resident, so nothing is read. What the layer calls and
`begin_step` cost, divided by the layers, stands against the bar. Learning from a step and scoring
all layers afresh, once per step (while a read is waited for if there is one, else at its end, as
here), is shown beside it, as its mean per layer; `bench_prefetch.py` has its bar.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import pstats
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.harness.options import parser_of  # noqa: E402
from scripts.harness.report import Bar, report_of  # noqa: E402
from vllm_moe_offload.cache.layout import ExpertLayout, TensorSpec  # noqa: E402
from vllm_moe_offload.cache.planner import ExpertCache  # noqa: E402
from vllm_moe_offload.cache.pool import SlotPool  # noqa: E402
from vllm_moe_offload.cache.sizing import cache_shape  # noqa: E402
from vllm_moe_offload.policy import Policy, make_policy  # noqa: E402
from vllm_moe_offload.runtime import OffloadRuntime  # noqa: E402
from vllm_moe_offload.step import StepTokens  # noqa: E402
from vllm_moe_offload.transfer import TransferEngine  # noqa: E402

POLICIES = ("lru", "lru-layer", "lfu", "lrfu", "trace")
BARS_US = {1: 15.0, 32: 40.0}
"""Microseconds per layer by the number of tokens."""
SHARES = (1.0, 0.5)
ROUTINGS = 16
"""Different steps that take turns, so that no table stays in the nearest cache."""
LAYOUT = ExpertLayout((TensorSpec("w", (4096,), "uint8", 4096),))

console = Console()


class _InstantTransfer:
    """Stands in for the TransferEngine: bytes are there at once."""

    read_bytes = 0

    def begin_read(self, requests: Sequence[tuple[int, int, int]]) -> None:
        """Nothing to read."""

    def end_read(self, pending: None) -> None:
        """Nothing to wait for."""

    def close(self) -> None:
        """Nothing to close."""


class Setup:
    """One policy on one cache whose experts are all resident.

    Attributes:
        steps: topk_ids of every layer, for each of the routings.
    """

    def __init__(
        self,
        policy: str,
        *,
        share: float,
        tokens: int,
        layers: int,
        experts: int,
        top_k: int,
    ) -> None:
        made = make_policy(policy, layers, experts)
        shape = cache_shape(
            int(share * layers * experts),
            num_layers=layers,
            num_experts=experts,
            top_k=top_k,
            rules=made.rules,
        )
        self.layers = layers
        self.cache = ExpertCache(shape, made.rules)
        self.runtime = OffloadRuntime(
            cache=self.cache,
            pool=SlotPool(LAYOUT, shape.num_pool_slots),
            transfer=cast(TransferEngine, _InstantTransfer()),
            policy=made,
        )
        rng = np.random.default_rng(0)
        # Every policy can hold as many experts of each layer, whatever its staging slots.
        usable = experts if shape.holds_everything else shape.num_slots // layers - 2
        subsets = [rng.permutation(experts)[:usable] for _ in range(layers)]
        self.steps = [
            [_routing(rng, subset, tokens, top_k) for subset in subsets]
            for _ in range(ROUTINGS)
        ]
        self._learning_ns = 0
        self._time_learning(made)
        self._requests = [f"request-{row}" for row in range(tokens)]
        self._position = 500
        self._fill(subsets, top_k)

    def _time_learning(self, policy: Policy) -> None:
        """Nothing is read here, so that it falls due at the end of the step."""
        end_step = policy.end_step

        def timed() -> None:
            began = time.perf_counter_ns()
            end_step()
            self._learning_ns += time.perf_counter_ns() - began

        policy.end_step = timed  # type: ignore[method-assign]

    def _fill(self, subsets: list[np.ndarray], top_k: int) -> None:
        """Makes resident what the routings can name."""
        if self.cache.shape.holds_everything:
            self.runtime.load_everything()
            return
        for layer, subset in enumerate(subsets):
            for begin in range(0, subset.size, top_k):
                ids = np.resize(subset[begin : begin + top_k], (1, top_k))
                self.runtime.begin_step(_rows(["fill"], layer + begin))
                self.runtime.begin_layer(layer, torch.from_numpy(ids.astype(np.int32)))
                self.runtime.end_layer(layer)
        self.runtime.end_request("fill")
        for layer, subset in enumerate(subsets):
            missing = (self.cache.page_table[layer, subset] < 0).sum()
            if missing:
                raise RuntimeError(f"{missing} experts of layer {layer} are not resident")

    def step(self, routing: int) -> tuple[int, int, int]:
        """Runs one step.

        Returns:
            Nanoseconds of ``begin_step``, of all layer calls together, and of learning.
        """
        self._learning_ns = 0
        self._position += 1
        tokens = _rows(self._requests, self._position)
        ids = self.steps[routing % ROUTINGS]
        begin_layer, end_layer = self.runtime.begin_layer, self.runtime.end_layer
        before = time.perf_counter_ns()
        self.runtime.begin_step(tokens)
        began = time.perf_counter_ns()
        for layer in range(self.layers):
            begin_layer(layer, ids[layer])
            end_layer(layer)
        learning = self._learning_ns
        return began - before, time.perf_counter_ns() - began - learning, learning


def _routing(
    rng: np.random.Generator, subset: np.ndarray, tokens: int, top_k: int
) -> torch.Tensor:
    rows = [rng.permutation(subset)[:top_k] for _ in range(tokens)]
    return torch.from_numpy(np.stack(rows).astype(np.int32))


def _rows(requests: list[str], position: int) -> StepTokens:
    count = len(requests)
    return StepTokens.of_lengths(
        requests,
        np.ones(count, np.int64),
        np.full(count, position, np.int64),
        np.zeros(count, np.bool_),
    )


def measure(setup: Setup, steps: int, warmup: int) -> dict[str, Any]:
    """Microseconds per layer of ``steps`` steps."""
    for routing in range(warmup):
        setup.step(routing)
    misses = setup.cache.count("misses")
    samples = [setup.step(routing) for routing in range(steps)]
    missed = setup.cache.count("misses") - misses
    if missed:
        raise RuntimeError(f"{missed} experts missed: this measured something else")
    per_layer = 1e-3 / setup.layers
    begins, layers, learning = (
        [value * per_layer for value in values] for values in zip(*samples, strict=True)
    )
    totals = [begin + layer for begin, layer in zip(begins, layers, strict=True)]
    return {
        "layer_us": statistics.median(layers),
        "begin_step_us": statistics.median(begins),
        "learning_us": statistics.median(learning),
        "learning_mean_us": statistics.fmean(learning),
        "total_us": statistics.median(totals),
        "total_mean_us": statistics.fmean(totals),
        "total_p95_us": float(np.percentile(totals, 95)),
        "samples_layer_us": [round(value, 3) for value in layers],
        "samples_begin_step_us": [round(value, 3) for value in begins],
    }


def profile(setup: Setup, steps: int) -> str:
    """Where the time goes, by function."""
    profiler = cProfile.Profile()
    profiler.enable()
    for routing in range(steps):
        setup.step(routing)
    profiler.disable()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(14)
    return text.getvalue()


def measure_cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every policy with every share of the experts cached and every number of tokens."""
    for policy, share, tokens in product(args.policies, SHARES, BARS_US):
        setup = Setup(
            policy,
            share=share,
            tokens=tokens,
            layers=args.layers,
            experts=args.experts,
            top_k=args.top_k,
        )
        figures = measure(setup, args.steps, args.warmup)
        if args.profile:
            console.print(f"[bold]{policy}, {share:.0%}, B={tokens}[/bold]")
            console.print(profile(setup, args.steps), highlight=False, markup=False)
        setup.runtime.close()
        yield {"policy": policy, "cache": share, "tokens": tokens} | figures


def table_of(cases: Sequence[dict[str, Any]]) -> Table:
    """A row per case."""
    table = Table(title="All experts hit: microseconds per layer (median)")
    columns = ("policy", "cache", "B", "calls", "begin_step", "total", "p95", "bar", "learning")
    for column in columns:
        table.add_column(column, justify="left" if column == "policy" else "right")
    for case in cases:
        table.add_row(
            case["policy"],
            f"{case['cache']:.0%}",
            str(case["tokens"]),
            f"{case['layer_us']:.1f}",
            f"{case['begin_step_us']:.1f}",
            f"{case['total_us']:.1f}",
            f"{case['total_p95_us']:.1f}",
            f"{BARS_US[case['tokens']]:g}",
            f"{case['learning_mean_us']:.1f}",
        )
    return table


def bars_of(cases: Sequence[dict[str, Any]], policies: Sequence[str]) -> list[Bar]:
    """The worst of the cache sizes, per policy and number of tokens."""
    return [
        Bar(
            f"{policy}, B={tokens}: us per layer, worst of the cache sizes",
            max(
                case["total_us"]
                for case in cases
                if case["policy"] == policy and case["tokens"] == tokens
            ),
            bar,
            "us",
            at_least=False,
        )
        for policy in policies
        for tokens, bar in BARS_US.items()
    ]


def main() -> int:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400, help="measured steps of each case")
    parser.add_argument("--warmup", type=int, default=150, help="steps before them")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), metavar="POLICY")
    parser.add_argument("--profile", action="store_true", help="also print where time goes")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.warmup = 20, 10
    torch.set_num_threads(1)
    cases = list(measure_cases(args))
    console.print(table_of(cases))
    data = {"parameters": vars(args), "cases": cases}
    report_of(args, "planner", data, bars_of(cases, args.policies))
    return 0


if __name__ == "__main__":
    sys.exit(main())
