"""Experts that do not fit: plain vLLM and the plugin in a memory cgroup smaller than them.

Needs root. Makes a model with 6 GB of experts, then a memory cgroup with less than that, no
swap, and an empty page cache. In it, one after the other:

    plain    `vllm serve MODEL`: is killed, or ends with an error; how is recorded
    build    `vllm serve MODEL --moe-offload=trace`: builds its store and answers requests
    reopen   the same again: opens the store and answers

Then plain vLLM answers the same requests without a limit: the model is sound, memory was
what it lacked, and the tokens are to be the same (--no-control leaves that out).
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.demo_model import Shape, expert_bytes  # noqa: E402
from scripts.harness.cgroup import (  # noqa: E402
    MemoryCgroup,
    kernel_log_of_kills,
    memory_cgroup,
)
from scripts.harness.completions import Turn, prompts, take_turn  # noqa: E402
from scripts.harness.models import ensure_model  # noqa: E402
from scripts.harness.options import (  # noqa: E402
    add_server_options,
    end_on_sigterm,
    parser_of,
)
from scripts.harness.page_cache import drop_caches  # noqa: E402
from scripts.harness.report import Bar, report_of  # noqa: E402
from scripts.harness.server import Server, ServerDied  # noqa: E402
from scripts.harness.serving import (  # noqa: E402
    BUILD_LOG,
    ENVIRONMENT,
    START_SECONDS,
    LogWatch,
    offload_counters,
    offload_options,
    start_server,
)

GIB = 1 << 30
LAYER = {"experts": 32, "top_k": 2, "hidden": 1024, "intermediate": 1280}
QUICK_LAYER = {"experts": 16, "top_k": 2, "hidden": 1024, "intermediate": 512}
KV_CACHE_BYTES = 128 << 20
MEMORY_OPTIONS = (
    "--kv-cache-memory-bytes",
    str(KV_CACHE_BYTES),
    "--gpu-memory-utilization",
    "0.1",
)
"""vLLM looks at the machine's memory, not the cgroup's: it has to be told."""

console = Console()


# ---- the three starts ------------------------------------------------------------------


def plain_in(cgroup: MemoryCgroup, model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Plain vLLM in the cgroup: how it ends."""
    drop_caches()
    cgroup.reset()
    kills, lines = cgroup.oom_kills, kernel_log_of_kills()
    outcome = "serves"
    status: int | None = None
    with start_server(
        args, model, "memory-plain", MEMORY_OPTIONS, prefix=cgroup.prefix
    ) as server:
        try:
            seconds = server.wait_healthy(START_SECONDS)
            # Weights are touched while they load, but let it show that it works.
            take_turn(server, prompts(1), 4)
        except ServerDied:
            outcome, status = "died", server.process.returncode
        except (TimeoutError, OSError, RuntimeError) as error:
            outcome = f"failed: {type(error).__name__}: {str(error)[:300]}"
        seconds = time.perf_counter() - server.began
        figures = cgroup.figures()
    killed = cgroup.oom_kills - kills
    cgroup.kill_all()
    known = set(lines)
    result = {
        "outcome": outcome,
        "exit_status": status,
        "oom_kills": killed,
        "seconds": seconds,
        "cgroup": figures,
        "kernel_log": [line for line in kernel_log_of_kills() if line not in known],
        "log_tail": server.log.splitlines()[-25:],
    }
    console.print(f"plain vLLM: {outcome}, {killed} process(es) killed by the kernel")
    return result


def offload_in(
    cgroup: MemoryCgroup, model: Path, args: argparse.Namespace, name: str, turns: int
) -> tuple[dict[str, Any], list[str]]:
    """The plugin in the cgroup: figures, and the texts that it generated."""
    drop_caches()
    cgroup.reset()
    kills = cgroup.oom_kills
    options = offload_options("trace", args.cache_gb, args.work_dir / "store-memory")
    with start_server(
        args, model, f"memory-{name}", [*MEMORY_OPTIONS, *options], prefix=cgroup.prefix
    ) as server:
        watch = LogWatch(server, BUILD_LOG)
        try:
            healthy = server.wait_healthy(START_SECONDS)
        finally:
            seconds = watch.close()
            at_start = cgroup.figures()
        done = [turn(server, args) for _ in range(turns)]
        counters = offload_counters(server)
        figures = cgroup.figures()
        log = server.log
    cgroup.kill_all()
    speeds = [turn.decode_speed for turn in done]
    needed = counters["hits"] + counters["misses"]
    result = {
        "healthy_s": healthy,
        "build_s": seconds["end"] - seconds["begin"] if "begin" in seconds else None,
        "opened_store": "experts are not loaded" in log,
        "plan": [line for line in log.splitlines() if "MoE offload: cache_gb" in line],
        "decode_tokens_per_s": statistics.median(speeds),
        "samples": [turn.to_json() for turn in done],
        "hit_rate": counters["hits"] / max(needed, 1),
        "counters": counters,
        "cgroup_until_healthy": at_start,
        "cgroup": figures,
        "oom_kills": cgroup.oom_kills - kills,
    }
    console.print(
        f"{name}: healthy after {healthy:.0f} s, {result['decode_tokens_per_s']:.2f} tokens/s, "
        f"hit rate {result['hit_rate']:.1%}, {figures['peak_anonymous_bytes'] / GIB:.2f} GiB "
        "held at most"
    )
    return result, done[0].texts


def control(model: Path, args: argparse.Namespace) -> list[str]:
    """What plain vLLM generates without a limit."""
    with start_server(args, model, "memory-control", MEMORY_OPTIONS) as server:
        server.wait_healthy(START_SECONDS)
        return turn(server, args).texts


def turn(server: Server, args: argparse.Namespace) -> Turn:
    """All requests, always the same ones."""
    return take_turn(server, prompts(args.requests), args.tokens)


# ---- the whole -------------------------------------------------------------------------


def model_shape(args: argparse.Namespace) -> dict[str, int]:
    """As many layers as ``--experts-gb`` asks for."""
    layer = QUICK_LAYER if args.quick else LAYER
    one_layer = expert_bytes("mixtral", Shape(layers=1, **layer))
    return {"layers": -(-int(args.experts_gb * 1e9) // one_layer), **layer}


def run(args: argparse.Namespace) -> int:
    """All starts, table and report."""
    shape = model_shape(args)
    all_experts = expert_bytes("mixtral", Shape(**shape))
    limit_bytes = int(args.limit_gib * GIB)
    if limit_bytes >= all_experts:
        console.print(
            f"--limit-gib {args.limit_gib:g} is not less than the experts' "
            f"{all_experts / GIB:.2f} GiB: that would prove nothing"
        )
        return 2
    model = ensure_model(args.work_dir, shape)
    shutil.rmtree(args.work_dir / "store-memory", ignore_errors=True)
    console.print(
        f"{all_experts / GIB:.2f} GiB of experts in a cgroup of {limit_bytes / GIB:.2f} GiB"
    )
    try:
        with memory_cgroup(limit_bytes) as cgroup:
            plain = plain_in(cgroup, model, args)
            build, texts = offload_in(cgroup, model, args, "build", args.turns)
            reopen, again = offload_in(cgroup, model, args, "reopen", args.turns)
    finally:
        if not args.keep_store:
            shutil.rmtree(args.work_dir / "store-memory", ignore_errors=True)
    wanted = control(model, args) if args.control else None
    same = None if wanted is None else wanted == texts == again
    console.print(table_of(all_experts, plain, build, reopen))
    report_of(
        args,
        "memory",
        {
            "parameters": vars(args) | {"shape": shape, "environment": ENVIRONMENT},
            "expert_bytes": all_experts,
            "limit_bytes": limit_bytes,
            "plain": plain,
            "build": build,
            "reopen": reopen,
            "same_output_as_plain": same,
        },
        bars_of(all_experts, plain, [build, reopen], same),
    )
    return 0


def bars_of(
    all_experts: int,
    plain: dict[str, Any],
    offload: Sequence[dict[str, Any]],
    same: bool | None,
) -> list[Bar]:
    """What plain vLLM cannot do and the plugin must; ``offload``: first start and second."""
    held = max(start["cgroup"]["peak_anonymous_bytes"] for start in offload)
    killed = sum(start["oom_kills"] for start in offload)
    limit_bytes = offload[0]["cgroup"]["limit_bytes"]
    bars = [
        Bar("plain vLLM cannot serve (1: yes)", float(plain["outcome"] != "serves"), 1),
        Bar("limit / experts", limit_bytes / all_experts, 1.0, at_least=False),
        Bar(
            "most memory held by the plugin's server / experts",
            held / all_experts,
            1.0,
            at_least=False,
        ),
        Bar("plugin serves, nothing killed (1: yes)", float(killed == 0), 1),
        Bar("second start opened the store (1: yes)", float(offload[1]["opened_store"]), 1),
    ]
    if same is not None:
        name = "tokens are those of plain vLLM without limit (1: yes)"
        bars.append(Bar(name, float(same), 1))
    return bars


def table_of(
    expert_bytes: int, plain: dict[str, Any], build: dict[str, Any], reopen: dict[str, Any]
) -> Table:
    limit = build["cgroup"]["limit_bytes"]
    title = f"{expert_bytes / GIB:.2f} GiB of experts in {limit / GIB:.2f} GiB of memory"
    table = Table(title=title)
    for column in ("", "plain vLLM", "first start", "second start"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("outcome", plain["outcome"], "serves", "serves")
    rows: Sequence[tuple[str, str, str]] = (
        ("killed by the kernel", "oom_kills", "{:d}"),
        ("/health after s", "healthy_s", "{:.1f}"),
        ("store built in s", "build_s", "{:.1f}"),
        ("decode tokens/s", "decode_tokens_per_s", "{:.2f}"),
        ("hit rate", "hit_rate", "{:.1%}"),
    )
    for title, name, form in rows:
        cells = [case.get(name) for case in (plain, build, reopen)]
        table.add_row(title, *("-" if cell is None else form.format(cell) for cell in cells))
    for title, name in (
        ("held at most, GiB", "peak_anonymous_bytes"),
        ("with page cache, GiB", "max_usage_bytes"),
    ):
        values = [case["cgroup"][name] for case in (plain, build, reopen)]
        table.add_row(title, *("-" if v is None else f"{v / GIB:.2f}" for v in values))
    return table


def main() -> int:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    add_server_options(parser)
    parser.add_argument("--experts-gb", type=float, default=6.0, help="GB (1e9) of experts")
    parser.add_argument("--limit-gib", type=float, default=4.5, help="of the memory cgroup")
    parser.add_argument("--cache-gb", default="1.5", help="cache_gb of the plugin")
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48, help="generated per request")
    parser.add_argument("--turns", type=int, default=3, help="times all requests are sent")
    parser.add_argument("--keep-store", action="store_true", help="leave the store behind")
    parser.add_argument(
        "--control",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also run plain vLLM without limit and compare the tokens",
    )
    args = parser.parse_args()
    end_on_sigterm()
    if os.geteuid() != 0:
        console.print(
            "bench_memory.py makes a memory cgroup and drops the page cache: it needs root"
        )
        return 2
    if args.quick:
        args.eager = True
        args.experts_gb, args.limit_gib, args.cache_gb = 3.2, 2.75, "0.25"
        args.requests, args.tokens, args.turns = 1, 8, 1
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
