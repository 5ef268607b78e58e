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
import contextlib
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.bench_report import Bar, end_on_sigterm, results_of, write_report  # noqa: E402
from scripts.bench_serving import (  # noqa: E402
    BUILD_LOG,
    ENVIRONMENT,
    LogWatch,
    Turn,
    add_server_options,
    drop_caches,
    ensure_model,
    offload_counters,
    offload_options,
    prompts,
    serve_options,
    take_turn,
)
from scripts.server import Server, ServerDied  # noqa: E402

GIB = 1 << 30
CGROUPS = Path("/sys/fs/cgroup")
LAYER = {"experts": 32, "top_k": 2, "hidden": 1024, "intermediate": 1280}
QUICK_LAYER = {"experts": 16, "top_k": 2, "hidden": 1024, "intermediate": 512}
KV_CACHE_BYTES = 128 << 20
START_SECONDS = 900

console = Console()


# ---- memory cgroups --------------------------------------------------------------------


class MemoryCgroup(ABC):
    """A cgroup with a limit on memory and no swap; a context manager that removes it.

    Attributes:
        path: its directory.
    """

    peaks: dict[str, int]

    def __init__(self, path: Path, limit_bytes: int) -> None:
        """Nothing is created yet."""
        self.path = path
        self.limit_bytes = limit_bytes
        self.peaks = {}
        self._sampling = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> MemoryCgroup:
        """Creates it. Raises OSError if the system does not let us."""
        self.path.mkdir()
        try:
            self._limit()
        except BaseException:
            self.path.rmdir()
            raise
        self._sampler.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._sampling.set()
        self._sampler.join()
        self.kill_all()
        for _ in range(50):
            with contextlib.suppress(OSError):
                self.path.rmdir()
                return
            time.sleep(0.2)
        console.print(f"[red]{self.path} could not be removed; rmdir it by hand[/red]")

    @property
    def prefix(self) -> list[str]:
        """Goes before a command that is to run inside."""
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.path / "cgroup.procs")]

    def kill_all(self) -> None:
        """Ends whatever still runs inside."""
        for _ in range(100):
            pids = (self.path / "cgroup.procs").read_text().split()
            if not pids:
                return
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.1)

    def reset(self) -> None:
        """Forgets the peaks so far."""
        self.peaks = {}
        self._reset_peak()

    def figures(self) -> dict[str, Any]:
        """Peaks since :meth:`reset`, and how often processes were killed in all.

        ``max_usage`` is the kernel's and counts the page cache, which it takes back when it
        needs to; ``anonymous`` (sampled) is what processes hold.
        """
        return {
            "limit_bytes": self.limit_bytes,
            "max_usage_bytes": self._max_usage(),
            "peak_anonymous_bytes": self.peaks.get("anonymous", 0),
            "peak_page_cache_bytes": self.peaks.get("page_cache", 0),
            "oom_kills": self.oom_kills,
        }

    def _read(self, name: str) -> str:
        return (self.path / name).read_text()

    def _write(self, name: str, value: int) -> None:
        (self.path / name).write_text(f"{value}\n")

    def _table(self, name: str) -> dict[str, int]:
        rows = (line.split() for line in self._read(name).splitlines())
        return {row[0]: int(row[1]) for row in rows if len(row) == 2}

    def _sample(self) -> None:
        while not self._sampling.wait(0.1):
            with contextlib.suppress(OSError):
                for name, value in self._usage().items():
                    self.peaks[name] = max(self.peaks.get(name, 0), value)

    @property
    @abstractmethod
    def oom_kills(self) -> int:
        """Processes that the kernel killed in it for want of memory."""

    @abstractmethod
    def _limit(self) -> None: ...

    @abstractmethod
    def _reset_peak(self) -> None: ...

    @abstractmethod
    def _max_usage(self) -> int | None: ...

    @abstractmethod
    def _usage(self) -> dict[str, int]: ...


class CgroupV1(MemoryCgroup):
    """Below /sys/fs/cgroup/memory."""

    def _limit(self) -> None:
        self._write("memory.limit_in_bytes", self.limit_bytes)
        self._write("memory.swappiness", 0)
        if (self.path / "memory.memsw.limit_in_bytes").exists():
            self._write("memory.memsw.limit_in_bytes", self.limit_bytes)

    @property
    def oom_kills(self) -> int:
        """See :class:`MemoryCgroup`."""
        return self._table("memory.oom_control").get("oom_kill", 0)

    def _reset_peak(self) -> None:
        self._write("memory.max_usage_in_bytes", 0)

    def _max_usage(self) -> int:
        return int(self._read("memory.max_usage_in_bytes"))

    def _usage(self) -> dict[str, int]:
        stat = self._table("memory.stat")
        return {"anonymous": stat["total_rss"], "page_cache": stat["total_cache"]}


class CgroupV2(MemoryCgroup):
    """Below /sys/fs/cgroup, where the memory controller is handed down."""

    def _limit(self) -> None:
        self._write("memory.max", self.limit_bytes)
        if (self.path / "memory.swap.max").exists():
            self._write("memory.swap.max", 0)

    @property
    def oom_kills(self) -> int:
        """See :class:`MemoryCgroup`."""
        return self._table("memory.events").get("oom_kill", 0)

    def _reset_peak(self) -> None:
        """Kernels before 6.12 cannot; the sampled peak stands in."""

    def _max_usage(self) -> int | None:
        return self.peaks.get("all")

    def _usage(self) -> dict[str, int]:
        stat = self._table("memory.stat")
        current = int(self._read("memory.current"))
        return {"anonymous": stat["anon"], "page_cache": stat["file"], "all": current}


def memory_cgroup(limit_bytes: int) -> MemoryCgroup:
    """One of whichever version the system has. Raises RuntimeError if it has none."""
    name = f"vllm-moe-offload-{os.getpid()}"
    if (CGROUPS / "memory" / "cgroup.procs").exists():
        return CgroupV1(CGROUPS / "memory" / name, limit_bytes)
    handed_down = CGROUPS / "cgroup.subtree_control"
    if handed_down.exists():
        if "memory" not in handed_down.read_text().split():
            handed_down.write_text("+memory")
        return CgroupV2(CGROUPS / name, limit_bytes)
    raise RuntimeError(f"no memory controller below {CGROUPS}")


def kernel_log_of_kills() -> list[str]:
    """The kernel's lines about killed processes, oldest first."""
    done = subprocess.run(["dmesg"], capture_output=True, text=True, check=False)
    wanted = re.compile(r"Memory cgroup out of memory|oom-kill:")
    return [line for line in done.stdout.splitlines() if wanted.search(line)]


# ---- the three starts ------------------------------------------------------------------


def plain_in(cgroup: MemoryCgroup, model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Plain vLLM in the cgroup: how it ends."""
    drop_caches()
    cgroup.reset()
    kills, lines = cgroup.oom_kills, kernel_log_of_kills()
    log = _log(args, "plain")
    outcome = "serves"
    status: int | None = None
    with Server(
        model, options_of(args), log=log, environment=ENVIRONMENT, prefix=cgroup.prefix
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
    with Server(
        model,
        options_of(args, *options),
        log=_log(args, name),
        environment=ENVIRONMENT,
        prefix=cgroup.prefix,
    ) as server:
        watch = LogWatch(server, BUILD_LOG)
        try:
            healthy = server.wait_healthy(START_SECONDS)
        finally:
            seconds = watch.close()
            at_start = cgroup.figures()
        done = [_turn(server, args) for _ in range(turns)]
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
    with Server(
        model, options_of(args), log=_log(args, "control"), environment=ENVIRONMENT
    ) as server:
        server.wait_healthy(START_SECONDS)
        return _turn(server, args).texts


def options_of(args: argparse.Namespace, *extra: str) -> list[str]:
    """vLLM looks at the machine's memory, not the cgroup's: it has to be told."""
    limits = ["--kv-cache-memory-bytes", str(KV_CACHE_BYTES), "--gpu-memory-utilization", "0.1"]
    return serve_options(args, *limits, *extra)


def _turn(server: Server, args: argparse.Namespace) -> Turn:
    return take_turn(server, prompts(args.requests), args.tokens)


def _log(args: argparse.Namespace, name: str) -> Path:
    directory: Path = args.work_dir / "logs"
    directory.mkdir(parents=True, exist_ok=True)
    return directory / f"memory-{name}.log"


# ---- the whole -------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """All starts, table and report."""
    layer = QUICK_LAYER if args.quick else LAYER
    layer_bytes = 6 * layer["experts"] * layer["hidden"] * layer["intermediate"]
    layers = -(-int(args.experts_gb * 1e9) // layer_bytes)
    expert_bytes = layers * layer_bytes
    limit_bytes = int(args.limit_gib * GIB)
    if limit_bytes >= expert_bytes:
        console.print(
            f"--limit-gib {args.limit_gib:g} is not less than the experts' "
            f"{expert_bytes / GIB:.2f} GiB: that would prove nothing"
        )
        return 2
    model = ensure_model(args.work_dir, {"layers": layers, **layer})
    shutil.rmtree(args.work_dir / "store-memory", ignore_errors=True)
    console.print(
        f"{expert_bytes / GIB:.2f} GiB of experts in a cgroup of {limit_bytes / GIB:.2f} GiB"
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
    console.print(_table(expert_bytes, plain, build, reopen))
    bars = [
        Bar("plain vLLM cannot serve (1: yes)", float(plain["outcome"] != "serves"), 1),
        Bar("limit / experts", limit_bytes / expert_bytes, 1.0, at_least=False),
        Bar(
            "most memory held by the plugin's server / experts",
            max(r["cgroup"]["peak_anonymous_bytes"] for r in (build, reopen)) / expert_bytes,
            1.0,
            at_least=False,
        ),
        Bar(
            "plugin serves, nothing killed (1: yes)",
            float(build["oom_kills"] + reopen["oom_kills"] == 0),
            1,
        ),
        Bar("second start opened the store (1: yes)", float(reopen["opened_store"]), 1),
    ]
    if same is not None:
        bars.append(
            Bar("tokens are those of plain vLLM without limit (1: yes)", float(same), 1)
        )
    write_report(
        "memory",
        {
            "parameters": vars(args)
            | {"shape": {"layers": layers, **layer}, "environment": ENVIRONMENT},
            "expert_bytes": expert_bytes,
            "limit_bytes": limit_bytes,
            "plain": plain,
            "build": build,
            "reopen": reopen,
            "same_output_as_plain": same,
        },
        bars=bars,
        work_dir=args.work_dir,
        results=results_of(args),
    )
    return 0


def _table(
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
