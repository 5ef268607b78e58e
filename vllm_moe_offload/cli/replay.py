"""``vllm-moe-offload replay``: what policies would have done on a recorded trace."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from vllm_moe_offload.cli.command import Command, UsageError, load_pyplot
from vllm_moe_offload.policy import POLICIES, make_policy
from vllm_moe_offload.replay.one_pool import (
    half_life_of,
    pool_slots,
    replay_one_pool,
    replay_one_pool_recorded,
)
from vllm_moe_offload.replay.run import ReplayResult, capacity_slots, replay, replay_recorded
from vllm_moe_offload.replay.schedule import decode_schedule
from vllm_moe_offload.trace.routing import RoutingTrace, load_trace


@dataclass(frozen=True, slots=True)
class _Planner:
    """Who decides where experts go in a replay.

    Attributes:
        policies: what ``--policy`` is unless it is given.
        check_policy: of a policy, layers and experts; raises if it cannot be replayed.
        slots: of a capacity, layers and experts; raises if there are none.
        replay, replay_recorded: by one token of every request per step; by the server's steps.
    """

    policies: str
    check_policy: Callable[[str, int, int], object]
    slots: Callable[[float, int, int], int]
    replay: Callable[..., ReplayResult]
    replay_recorded: Callable[..., ReplayResult]


_PLANNERS = {
    "host": _Planner(
        "lru,lru-layer,lfu,lrfu,eamc,trace,belady",
        make_policy,
        capacity_slots,
        replay,
        replay_recorded,
    ),
    "device": _Planner(
        "lrfu", half_life_of, pool_slots, replay_one_pool, replay_one_pool_recorded
    ),
}


def _items(option: str, text: str) -> list[str]:
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise UsageError(f"{option} is empty; give one or more values separated by commas")
    return items


def _numbers(option: str, text: str, kind: Callable[[str], Any], allowed: str) -> list[Any]:
    values = []
    for item in _items(option, text):
        try:
            values.append(kind(item))
        except ValueError as error:
            raise UsageError(f"{option}={item}: must be {allowed}") from error
    return values


def _policy_specs(text: str) -> list[str]:
    """Splits ``lru,lrfu:half_life=8,eamc:entries=9``: a parameter belongs to the policy before it."""
    specs: list[str] = []
    for item in _items("--policy", text):
        is_parameter = "=" in item and ":" not in item
        if is_parameter and specs and ":" in specs[-1]:
            specs[-1] += f",{item}"
        else:
            specs.append(item)
    return specs


def _add_replay_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", metavar="TRACE.npz", help="routing trace")
    parser.add_argument(
        "--policy",
        help=f"comma-separated, of {', '.join(POLICIES)}; parameters as in lrfu:half_life=8 "
        "(default: all; with --planner device: lrfu, the only one it has)",
    )
    parser.add_argument(
        "--capacity",
        default="0.25",
        help="shares of all experts, e.g. 0.125,0.25,0.5 (default: %(default)s)",
    )
    parser.add_argument(
        "--concurrency", default="1", help="requests at a time, e.g. 1,4,8 (default: 1)"
    )
    parser.add_argument(
        "--requests", type=int, help="only the first N requests of the trace (default: all)"
    )
    parser.add_argument(
        "--schedule",
        choices=["decode", "recorded"],
        default="decode",
        help="decode: one token of every active request per step; recorded: the steps, slots "
        "and staging slots of the server that recorded the trace (default: decode)",
    )
    parser.add_argument(
        "--planner",
        choices=list(_PLANNERS),
        default="host",
        help="host: slots, and staging that is free; device: every miss takes one of the slots, "
        "as a GPU would plan by itself, which servers do not do yet (default: host)",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the results as JSON; - is stdout (default: none)"
    )
    parser.add_argument(
        "--plot", metavar="FILE.png", help="draw hit rate over capacity (default: none)"
    )


def _run_replay(arguments: argparse.Namespace) -> int:
    trace = load_trace(arguments.trace)
    planner = _PLANNERS[arguments.planner]
    specs = _policy_specs(planner.policies if arguments.policy is None else arguments.policy)
    for spec in specs:
        planner.check_policy(spec, trace.num_layers, trace.num_experts)
    if arguments.schedule == "recorded":
        results = _replay_recorded(planner, trace, specs)
    else:
        results = _replay_grid(planner, trace, specs, arguments)
    documents = [result.as_dict() for result in results]
    if arguments.json == "-":
        print(json.dumps(documents, indent=2))
    else:
        _print_results(results)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(documents, indent=2) + "\n")
    if arguments.plot:
        _plot_results(results, arguments.plot)
    return 0


def _replay_recorded(
    planner: _Planner, trace: RoutingTrace, specs: Sequence[str]
) -> list[ReplayResult]:
    return [
        planner.replay_recorded(trace, spec)
        for spec in tqdm(specs, unit="policy", leave=False, disable=None)
    ]


def _replay_grid(
    planner: _Planner,
    trace: RoutingTrace,
    specs: Sequence[str],
    arguments: argparse.Namespace,
) -> list[ReplayResult]:
    capacities = _numbers("--capacity", arguments.capacity, float, "a number in (0, 1]")
    concurrencies = _numbers("--concurrency", arguments.concurrency, int, "an integer above 0")
    for capacity in capacities:
        planner.slots(capacity, trace.num_layers, trace.num_experts)
    cells = list(itertools.product(concurrencies, capacities, specs))
    tokens = sum(
        int(decode_schedule(trace, concurrency, arguments.requests).token.size)
        for concurrency in concurrencies
    )
    total = tokens * len(capacities) * len(specs)
    results = []
    with tqdm(total=total, unit="tok", unit_scale=True, leave=False, disable=None) as bar:
        for concurrency, capacity, spec in cells:
            bar.set_description(f"{spec} B={concurrency} {capacity:g}")
            results.append(
                planner.replay(
                    trace,
                    spec,
                    capacity,
                    concurrency,
                    num_requests=arguments.requests,
                    progress=bar.update,
                )
            )
    return results


def _print_results(results: Sequence[ReplayResult]) -> None:
    table = Table()
    table.add_column("policy", no_wrap=True)
    for heading in ("capacity", "concurrency", "hit rate", "misses per token"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            result.policy,
            f"{result.capacity:.3g}",
            "recorded" if result.concurrency is None else str(result.concurrency),
            f"{result.hit_rate:.4f}",
            f"{result.misses_per_token:.2f}",
        )
    Console().print(table)


def _plot_results(results: Sequence[ReplayResult], path: str) -> None:
    pyplot = load_pyplot()
    concurrencies = list(dict.fromkeys(result.concurrency for result in results))
    figure, axes = pyplot.subplots(
        1, len(concurrencies), figsize=(5 * len(concurrencies), 4), squeeze=False
    )
    for axis, concurrency in zip(axes[0], concurrencies, strict=True):
        for policy in dict.fromkeys(result.policy for result in results):
            points = [
                (result.capacity, result.hit_rate)
                for result in results
                if result.policy == policy and result.concurrency == concurrency
            ]
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=policy)
        axis.set_title(
            "recorded" if concurrency is None else f"{concurrency} requests at a time"
        )
        axis.set_xlabel("share of experts in the cache")
        axis.set_ylabel("hit rate")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


COMMAND = Command(
    ("replay",),
    "policy table on a recorded routing trace",
    _add_replay_arguments,
    _run_replay,
)
