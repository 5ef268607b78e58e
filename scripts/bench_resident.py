"""Everything cached: decode speed against plain vLLM, two live servers.

    python scripts/bench_resident.py [--quick]

Both servers answer the same requests in every round, one after the other; which one comes
first changes from round to round, and only one works at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.harness.completions import Turn, ask, prompts, take_turn  # noqa: E402
from scripts.harness.models import ensure_model, shape_of  # noqa: E402
from scripts.harness.options import (  # noqa: E402
    add_server_options,
    end_on_sigterm,
    parser_of,
)
from scripts.harness.pairing import bootstrap_of_median, orders, spread  # noqa: E402
from scripts.harness.report import Bar, report_of  # noqa: E402
from scripts.harness.server import Server  # noqa: E402
from scripts.harness.serving import (  # noqa: E402
    ENVIRONMENT,
    SETTLE_SECONDS,
    START_SECONDS,
    cpu_seconds,
    offload_options,
    start_server,
)

Round = dict[str, Any]

console = Console()


def measure(args: argparse.Namespace) -> tuple[bool, list[Round]]:
    """Whether both servers generate the same, and their rounds."""
    model = ensure_model(args.work_dir, shape_of(args))
    texts = prompts(args.requests)
    options = {
        "plain": [],
        "offload": offload_options("trace", "100%", args.work_dir / "store"),
    }
    with contextlib.ExitStack() as stack:
        servers: dict[str, Server] = {}
        for name, extra in options.items():
            console.print(f"Starting {name}")
            server = start_server(args, model, f"resident-{name}", extra)
            servers[name] = stack.enter_context(server)
            server.wait_healthy(START_SECONDS)
        outputs = {name: turn(server, texts, args).texts for name, server in servers.items()}
        same = outputs["plain"] == outputs["offload"]
        if not same:
            console.print("[red]The servers' greedy outputs differ.[/red]")
        return same, list(take_rounds(servers, texts, args))


def take_rounds(
    servers: Mapping[str, Server], texts: Sequence[str], args: argparse.Namespace
) -> Iterator[Round]:
    """Both servers once per round, while the other one idles."""
    for number, names in enumerate(orders(list(servers), args.rounds)):
        result: Round = {"order": names, "idle_cpu_share": {}}
        for name in names:
            idle = servers[next(other for other in names if other != name)]
            time.sleep(SETTLE_SECONDS)
            with frozen(idle, args.freeze_idle):
                before, began = cpu_seconds(idle.process.pid), time.perf_counter()
                result[name] = turn(servers[name], texts, args).to_json()
                used = cpu_seconds(idle.process.pid) - before
            result["idle_cpu_share"][name] = used / (time.perf_counter() - began)
        speeds = {name: f"{result[name]['decode_tokens_per_s']:.2f}" for name in servers}
        console.print(f"round {number + 1}: {speeds}")
        yield result


def turn(server: Server, texts: Sequence[str], args: argparse.Namespace) -> Turn:
    """All requests, after one that wakes the server up."""
    ask(server.port, texts[0], 4)
    time.sleep(0.1)  # until it is counted
    return take_turn(server, texts, args.tokens)


@contextlib.contextmanager
def frozen(server: Server, freeze: bool) -> Iterator[None]:
    """Stops all processes of a server for a while, if asked to."""
    if not freeze:
        yield
        return
    os.killpg(server.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(server.process.pid, signal.SIGCONT)


def ratios_of(rounds: Sequence[Round], figure: str) -> list[float]:
    """Offload's figure by plain vLLM's of the same round."""
    return [result["offload"][figure] / result["plain"][figure] for result in rounds]


def summary(rounds: Sequence[Round]) -> dict[str, Any]:
    """The report's figures of all rounds."""
    ratios = ratios_of(rounds, "decode_tokens_per_s")
    client_ratios = ratios_of(rounds, "client_tokens_per_s")
    speeds = {
        name: spread([one[name]["decode_tokens_per_s"] for one in rounds])
        for name in ("plain", "offload")
    }
    return {
        "ratios": ratios,
        "client_ratios": client_ratios,
        "medians": speeds | {"ratio": statistics.median(ratios)},
        "confidence_interval_95": bootstrap_of_median(ratios),
        "client_confidence_interval_95": bootstrap_of_median(client_ratios),
    }


def show(rounds: Sequence[Round], found: Mapping[str, Any]) -> None:
    """The table, and what both servers have in common."""
    table = Table(title=f"Everything resident: decode tokens/s, {len(rounds)} rounds")
    for column in ("server", "median", "min", "max"):
        table.add_column(column, justify="right")
    for name in ("plain", "offload"):
        table.add_row(name, *(f"{value:.2f}" for value in found["medians"][name].values()))
    console.print(table)
    low, high = found["confidence_interval_95"]
    idle = [share for one in rounds for share in one["idle_cpu_share"].values()]
    console.print(
        f"median of the ratios per round {found['medians']['ratio']:.4f}, 95 % CI "
        f"[{low:.4f}, {high:.4f}]; as the client sees it "
        f"{statistics.median(found['client_ratios']):.4f}; the idle server used "
        f"{statistics.median(idle):.1%} of a core, at most {max(idle):.1%}"
    )


def main() -> int:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    add_server_options(parser)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--requests", type=int, default=2, help="per server and round")
    parser.add_argument("--tokens", type=int, default=96, help="generated per request")
    parser.add_argument(
        "--freeze-idle",
        action="store_true",
        help="SIGSTOP the server that is not measured (its CPU use is reported either way)",
    )
    args = parser.parse_args()
    end_on_sigterm()
    if args.quick:
        args.eager, args.rounds, args.requests, args.tokens = True, 2, 1, 16
    same, rounds = measure(args)
    found = summary(rounds)
    show(rounds, found)
    high = found["confidence_interval_95"][1]
    report_of(
        args,
        "resident",
        {
            "parameters": vars(args) | {"shape": shape_of(args), "environment": ENVIRONMENT},
            "same_output": same,
            "samples": rounds,
            **found,
        },
        [
            Bar("decode, offload / plain: upper end of the median's 95 % CI", high, 0.98),
            Bar("greedy outputs are the same (1: yes)", float(same), 1),
        ],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
