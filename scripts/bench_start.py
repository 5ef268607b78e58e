"""How long starts take: a second one against plain vLLM's, a first one against the raw disk.

    python scripts/bench_start.py [--quick]

Needs root. Second starts: seconds to /health with a warm page cache and with an empty one.
First starts: the time to build the store, beside raw reads and writes of as many bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.demo_model import Shape, expert_bytes  # noqa: E402
from scripts.harness.models import ensure_model, shape_of  # noqa: E402
from scripts.harness.options import (  # noqa: E402
    add_server_options,
    end_on_sigterm,
    parser_of,
)
from scripts.harness.page_cache import drop_caches, warm_page_cache  # noqa: E402
from scripts.harness.pairing import orders, spread  # noqa: E402
from scripts.harness.report import Bar, report_of  # noqa: E402
from scripts.harness.serving import (  # noqa: E402
    BUILD_LOG,
    ENVIRONMENT,
    START_SECONDS,
    LogWatch,
    offload_options,
    start_server,
)
from vllm_moe_offload.cache.host_memory import anonymous_region  # noqa: E402

Row = dict[str, Any]

console = Console()


def start_once(
    args: argparse.Namespace, model: Path, options: Sequence[str], name: str
) -> tuple[float, dict[str, float], str]:
    """Seconds to /health, times of the build's log lines, the log."""
    with start_server(args, model, f"start-{name}", options) as server:
        watch = LogWatch(server, BUILD_LOG if options else {})
        healthy = server.wait_healthy(START_SECONDS)
        return healthy, watch.close(), server.log


# ---- second starts ---------------------------------------------------------------------


def second_starts(
    args: argparse.Namespace, model: Path, store: Path, condition: str
) -> Iterator[Row]:
    kinds: dict[str, list[str]] = {"plain": []}
    for cache in args.caches:
        kinds[f"cache_gb={cache}"] = offload_options("trace", cache, store)
    for number, names in enumerate(orders(list(kinds), args.repeats)):
        row: Row = {"page_cache": condition, "order": names, "seconds": {}}
        for name in names:
            if condition == "dropped":
                drop_caches()
            else:
                warm_page_cache(model)
            label = re.sub(r"\W+", "", name)
            seconds, _, log = start_once(args, model, kinds[name], label)
            if kinds[name] and "store" not in log:
                raise RuntimeError(f"{name}: the log says nothing of a store:\n{log[-3000:]}")
            if BUILD_LOG["begin"] in log:
                raise RuntimeError(f"{name} built the store again:\n{log[-3000:]}")
            row["seconds"][name] = seconds
            console.print(f"{condition} {number + 1}: {name} {seconds:.2f} s")
        yield row


def second_table(rows: Sequence[Row], conditions: Sequence[str]) -> tuple[Table, list[Bar]]:
    """Second starts by page cache and server; the bars of those with a warm cache."""
    bars = []
    table = Table(title="Second start: seconds to /health (median)")
    for column in ("page cache", "server", "seconds", "min", "max", "more than plain"):
        table.add_column(column, justify="left" if column == "server" else "right")
    for condition in conditions:
        seconds = [row["seconds"] for row in rows if row["page_cache"] == condition]
        for name in seconds[0]:
            figures = spread([one[name] for one in seconds])
            more = statistics.median(one[name] - one["plain"] for one in seconds)
            table.add_row(
                condition, name, *(f"{value:.2f}" for value in figures.values()), f"{more:+.2f}"
            )
            if condition == "warm" and name != "plain":
                title = f"second start, {name}: seconds more than plain vLLM's (median)"
                bars.append(Bar(title, more, 2.0, "s", at_least=False))
    return table, bars


# ---- first starts ----------------------------------------------------------------------


def first_start(args: argparse.Namespace, model: Path, store: Path, number: int) -> Row:
    """Builds a store with caches dropped, between raw reads and writes of its bytes."""
    shutil.rmtree(store, ignore_errors=True)
    files = sorted(model.glob("*.safetensors"))
    raw: dict[str, list[float]] = {"read": [], "write": []}
    size = expert_bytes("mixtral", Shape(**shape_of(args)))

    def measure_raw() -> None:
        drop_caches()
        read_bytes = sum(path.stat().st_size for path in files)
        raw["read"].append(raw_read_seconds(files) * size / read_bytes)
        raw["write"].append(raw_write_seconds(args.work_dir / "raw.bin", size))

    measure_raw()
    drop_caches()
    options = offload_options("trace", args.caches[0], store)
    healthy, seconds, log = start_once(args, model, options, f"first-{number}")
    if seconds.keys() != BUILD_LOG.keys():
        raise RuntimeError(f"the log does not show the build:\n{log[-3000:]}")
    written = sum(path.stat().st_size for path in store.rglob("experts.bin"))
    measure_raw()
    read_s, write_s = (statistics.fmean(raw[kind]) for kind in ("read", "write"))
    build_s = seconds["end"] - seconds["begin"]
    console.print(
        f"first start {number + 1}: built in {build_s:.2f} s; raw read {read_s:.2f} s, raw "
        f"write {write_s:.2f} s"
    )
    return {
        "build_s": build_s,
        "expert_bytes": size,
        "store_bytes": written,
        "raw_read_s": read_s,
        "raw_write_s": write_s,
        "samples_raw_s": raw,
        "ratio": build_s / (read_s + write_s),
        "healthy_s": healthy,
        "log_lines_s": seconds,
    }


def first_table(rows: Sequence[Row]) -> tuple[Table, list[Bar]]:
    """First starts, and the bar of their median, if there were any."""
    table = Table(title="First start: building the store, caches dropped")
    for column in ("build s", "raw read s", "raw write s", "ratio", "/health s"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row['build_s']:.2f}",
            f"{row['raw_read_s']:.2f}",
            f"{row['raw_write_s']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['healthy_s']:.1f}",
        )
    if not rows:
        return table, []
    ratio = statistics.median(row["ratio"] for row in rows)
    title = "first start: build time / (raw read + raw write), median"
    return table, [Bar(title, ratio, 1.3, at_least=False)]


# ---- the raw disk ----------------------------------------------------------------------

_BLOCK_BYTES = 8 << 20
_RAW_THREADS = 4


def raw_read_seconds(files: Sequence[Path]) -> float:
    """Reads files with O_DIRECT, 4 reads of 8 MiB in flight."""
    local = threading.local()
    began = time.perf_counter()
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(_RAW_THREADS) as threads:
        blocks = []
        for path in files:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
            stack.callback(os.close, descriptor)
            size = path.stat().st_size
            blocks += [(descriptor, offset) for offset in range(0, size, _BLOCK_BYTES)]

        def read(block: tuple[int, int]) -> None:
            if not hasattr(local, "buffer"):
                local.buffer = _random_block()
            os.preadv(block[0], [local.buffer], block[1])

        for _ in threads.map(read, blocks):
            pass
        return time.perf_counter() - began


def raw_write_seconds(path: Path, nbytes: int) -> float:
    """Writes a new file with O_DIRECT, 4 writes of 8 MiB in flight, to the device's end."""
    buffer = _random_block()
    began = time.perf_counter()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o600)
    try:
        with ThreadPoolExecutor(_RAW_THREADS) as threads:
            offsets = range(0, nbytes, _BLOCK_BYTES)
            for count in threads.map(lambda at: os.pwritev(descriptor, [buffer], at), offsets):
                if count != _BLOCK_BYTES:
                    raise OSError(f"{path}: {count} bytes written instead of {_BLOCK_BYTES}")
        os.fsync(descriptor)
        return time.perf_counter() - began
    finally:
        os.close(descriptor)
        path.unlink()


def _random_block() -> memoryview:
    """8 MiB, page-aligned; random, lest something below compresses it."""
    region = anonymous_region(_BLOCK_BYTES)
    region[:] = os.urandom(_BLOCK_BYTES)
    return memoryview(region)


def main() -> int:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    add_server_options(parser)
    parser.add_argument("--repeats", type=int, default=5, help="starts of each kind")
    parser.add_argument("--builds", type=int, default=3, help="first starts")
    parser.add_argument("--caches", nargs="+", default=["50%", "100%"], help="cache_gb values")
    parser.add_argument(
        "--conditions", nargs="+", choices=("warm", "dropped"), default=["warm", "dropped"]
    )
    args = parser.parse_args()
    end_on_sigterm()
    if args.quick:
        args.eager, args.repeats, args.builds = True, 1, 1
        args.caches, args.conditions = ["50%"], ["warm"]
    if os.geteuid() != 0:
        console.print("bench_start.py drops the page cache: run it as root")
        return 2
    model = ensure_model(args.work_dir, shape_of(args))
    store = args.work_dir / "store-start"
    first = [first_start(args, model, store, number) for number in range(args.builds)]
    start_once(args, model, [], "plain-warmup")  # fills the compilation cache
    second = [
        row
        for condition in args.conditions
        for row in second_starts(args, model, store, condition)
    ]
    bars = []
    for table, found in (second_table(second, args.conditions), first_table(first)):
        console.print(table)
        bars += found
    report_of(
        args,
        "start",
        {
            "parameters": vars(args) | {"shape": shape_of(args), "environment": ENVIRONMENT},
            "first_start": first,
            "second_start": second,
        },
        bars,
    )
    shutil.rmtree(store)
    return 0


if __name__ == "__main__":
    sys.exit(main())
