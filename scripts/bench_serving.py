"""Benchmarks with real servers: `vllm serve` on loopback, one HTTP request at a time.

    resident        everything cached: decode speed against plain vLLM, two live servers
    llamacpp-shape  tokens/s with 100 %, 55 % and 36 % of a 2.4 GB model's experts in memory
    start           seconds to /health of a second start; build time of the store

All use a Mixtral-shaped demo model in bf16 (12 layers, 16 experts, top-2, hidden 1024,
intermediate 2048), written once below --work-dir.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import os
import random
import re
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.bench_report import (  # noqa: E402
    Bar,
    add_common_options,
    end_on_sigterm,
    results_of,
    write_report,
)
from scripts.demo_model import TOPICS, write_demo_model  # noqa: E402
from scripts.server import HOST, Server  # noqa: E402

LLAMACPP_SHAPE = {"layers": 12, "experts": 16, "top_k": 2, "hidden": 1024, "intermediate": 2048}
QUICK_SHAPE = {"layers": 4, "experts": 8, "top_k": 2, "hidden": 256, "intermediate": 256}
LLAMACPP = {1.0: 51.0, 0.55: 2.3, 0.36: 0.86}
"""Tokens/s of llama.cpp (mmap) by the share of weights in memory. Measured by others, on 2
cores with 2.4 GB of bf16 weights of this shape; not measured here."""

NAME = "bench"
KV_CACHE_BYTES = 512 << 20
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""The same for every server: compute on core 0, all else where it likes."""
SETTLE_SECONDS = 1.5
"""vLLM's workers spin for one second after their last message; then they sleep."""

console = Console()


# ---- shared by the benchmarks ----------------------------------------------------------


def ensure_model(directory: Path, shape: Mapping[str, int], arch: str = "mixtral") -> Path:
    """The demo model of that shape below ``directory``, written if it is missing."""
    sizes = "-".join(str(size) for size in shape.values())
    model = directory / "models" / f"{arch}-{sizes}"
    if not (model / "config.json").exists():
        console.print(f"Writing {model}")
        write_demo_model(model, arch, **shape, force=True, progress=sys.stderr.isatty())
    return model


def prompts(count: int, words: int = 24, seed: int = 0) -> list[str]:
    """Texts that keep to a topic each; the same ones at every call with the same seed."""
    rng = random.Random(seed)
    topics = list(itertools.islice(itertools.cycle(TOPICS.values()), count))
    return [" ".join(rng.choices(topic.split(), k=words)) for topic in topics]


def serve_options(args: argparse.Namespace, *extra: str) -> list[str]:
    """What every server gets, whether it offloads or not."""
    options = [
        "--served-model-name",
        NAME,
        "--max-model-len",
        "1024",
        "--max-num-seqs",
        "4",
        "--kv-cache-memory-bytes",
        str(KV_CACHE_BYTES),
        "--no-enable-prefix-caching",
    ]
    if args.eager:
        options.append("--enforce-eager")
    return [*options, *extra]


def offload_options(mode: str, cache: str, store: Path) -> list[str]:
    """The options of a server that offloads."""
    return [
        f"--moe-offload={mode}",
        "--moe-offload-config.cache_gb",
        cache,
        "--moe-offload-config.store_dir",
        str(store),
    ]


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion as the client saw it: generated tokens, seconds with the prompt's."""

    text: str
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Turn:
    """Requests that a server answered one after the other.

    Attributes:
        answers: one per request.
        decode_s: from first to last token, summed, by the engine's own clock
            (``vllm:request_decode_time_seconds``): ``tokens - 1`` steps each. A client's
            clock sees several tokens arrive at once where the API server waits for a core.
        seconds: of all requests, by the client's clock.
    """

    answers: list[Answer]
    decode_s: float
    seconds: float

    @property
    def texts(self) -> list[str]:
        """What was generated."""
        return [answer.text for answer in self.answers]

    @property
    def tokens(self) -> int:
        """Generated tokens."""
        return sum(answer.tokens for answer in self.answers)

    @property
    def decode_speed(self) -> float:
        """Decoded tokens per second; prompts and HTTP don't count."""
        return (self.tokens - len(self.answers)) / self.decode_s

    @property
    def client_speed(self) -> float:
        """Tokens per second that the client got, prompts included."""
        return self.tokens / self.seconds

    def to_json(self) -> dict[str, Any]:
        """Figures for a report."""
        return {
            "decode_tokens_per_s": self.decode_speed,
            "client_tokens_per_s": self.client_speed,
            "decode_s": self.decode_s,
            "request_s": [answer.seconds for answer in self.answers],
            "tokens": self.tokens,
        }


def ask(port: int, prompt: str, max_tokens: int, temperature: float = 0.0) -> Answer:
    """A completion of exactly ``max_tokens`` tokens; greedy at temperature 0."""
    connection = http.client.HTTPConnection(HOST, port, timeout=900)
    body = {
        "model": NAME,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": 0,
        "ignore_eos": True,
    }
    began = time.perf_counter()
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    content = response.read()
    seconds = time.perf_counter() - began
    connection.close()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {content[:2000]!r}")
    data = json.loads(content)
    tokens = data["usage"]["completion_tokens"]
    if tokens != max_tokens:
        raise RuntimeError(f"{tokens} tokens came instead of {max_tokens}")
    return Answer(data["choices"][0]["text"], tokens, seconds)


def take_turn(
    server: Server, texts: Sequence[str], max_tokens: int, temperature: float = 0.0
) -> Turn:
    """Sends the requests one after the other; nobody else may send any meanwhile."""
    count_before, decode_before = _decode_time(server)
    began = time.perf_counter()
    answers = [ask(server.port, text, max_tokens, temperature) for text in texts]
    seconds = time.perf_counter() - began
    deadline = time.perf_counter() + 10
    while True:  # a request may be answered a moment before it is counted
        count, decode = _decode_time(server)
        if count - count_before >= len(texts):
            break
        if time.perf_counter() > deadline:
            raise RuntimeError(f"{count - count_before} of {len(texts)} requests were counted")
        time.sleep(0.05)
    if count - count_before != len(texts):
        raise RuntimeError(f"{server.url} served somebody else, too")
    return Turn(answers, decode - decode_before, seconds)


def _decode_time(server: Server) -> tuple[float, float]:
    metrics = server.metrics()
    name = "vllm:request_decode_time_seconds"
    return metrics.get(f"{name}_count", 0.0), metrics.get(f"{name}_sum", 0.0)


def offload_counters(server: Server) -> dict[str, float]:
    """The plugin's counters: hits, misses, read_bytes, stall_seconds."""
    metrics = server.metrics()
    names = ("hits", "misses", "read_bytes", "stall_seconds")
    return {name: metrics[f"vllm:moe_offload_{name}_total"] for name in names}


def drop_caches() -> None:
    """Empties the page cache. Raises PermissionError unless root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def warm_page_cache(directory: Path) -> None:
    """Reads all files once, as a start would find them after another."""
    buffer = bytearray(8 << 20)
    for path in sorted(directory.glob("*")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


class LogWatch:
    """Notes when texts first appear in a server's log, to 20 ms; vLLM's log has seconds."""

    def __init__(self, server: Server, texts: Mapping[str, str]) -> None:
        """``texts``: name to what is waited for."""
        self.seconds: dict[str, float] = {}
        self._server = server
        self._texts = dict(texts)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.02) and len(self.seconds) < len(self._texts):
            now, log = time.perf_counter() - self._server.began, self._server.log
            for name, text in self._texts.items():
                if name not in self.seconds and text in log:
                    self.seconds[name] = now

    def close(self) -> dict[str, float]:
        """Seconds since the server's start, by name, as far as the texts were seen."""
        self._stop.set()
        self._thread.join()
        return self.seconds


BUILD_LOG = {"begin": "building the expert store in", "end": "MoE offload: store built:"}
"""Lines around the building of a store: begins to read experts; committed."""


def cpu_seconds(session: int) -> float:
    """CPU time of all living processes of a session (a Server starts one)."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# ---- resident ----------------------------------------------------------------------------


def resident(args: argparse.Namespace) -> int:
    """Decode speed with every expert cached against plain vLLM."""
    model = ensure_model(args.work_dir, _shape(args))
    logs = _logs(args)
    texts = prompts(args.requests)
    plain_log, offload_log = logs / "resident-plain.log", logs / "resident-offload.log"
    options = offload_options("trace", "100%", args.work_dir / "store")
    with contextlib.ExitStack() as stack:
        servers: dict[str, Server] = {}
        for name, extra, log in (
            ("plain", [], plain_log),
            ("offload", options, offload_log),
        ):
            console.print(f"Starting {name}")
            servers[name] = stack.enter_context(
                Server(model, serve_options(args, *extra), log=log, environment=ENVIRONMENT)
            )
            servers[name].wait_healthy(900)
        outputs = {name: _turn(server, texts, args).texts for name, server in servers.items()}
        same = outputs["plain"] == outputs["offload"]
        if not same:
            console.print("[red]The servers' greedy outputs differ.[/red]")
        rounds = list(_rounds(servers, texts, args))
    ratios = _ratios(rounds, "decode_tokens_per_s")
    client_ratios = _ratios(rounds, "client_tokens_per_s")
    median = statistics.median(ratios)
    low, high = bootstrap_of_median(ratios)
    idle = [share for r in rounds for share in r["idle_cpu_share"].values()]
    table = Table(title=f"Everything resident: decode tokens/s, {len(rounds)} rounds")
    for column in ("server", "median", "min", "max"):
        table.add_column(column, justify="right")
    medians = {}
    for name in servers:
        medians[name] = spread([r[name]["decode_tokens_per_s"] for r in rounds])
        table.add_row(name, *(f"{value:.2f}" for value in medians[name].values()))
    console.print(table)
    console.print(
        f"median of the ratios per round {median:.4f}, 95 % CI [{low:.4f}, {high:.4f}]; as "
        f"the client sees it {statistics.median(client_ratios):.4f}; the idle server used "
        f"{statistics.median(idle):.1%} of a core, at most {max(idle):.1%}"
    )
    write_report(
        "resident",
        {
            "parameters": vars(args) | {"shape": _shape(args), "environment": ENVIRONMENT},
            "same_output": same,
            "samples": rounds,
            "ratios": ratios,
            "client_ratios": client_ratios,
            "medians": medians | {"ratio": median},
            "confidence_interval_95": [low, high],
            "client_confidence_interval_95": bootstrap_of_median(client_ratios),
        },
        bars=[
            Bar("decode, offload / plain: upper end of the median's 95 % CI", high, 0.98),
            Bar("greedy outputs are the same (1: yes)", float(same), 1),
        ],
        work_dir=args.work_dir,
        results=results_of(args),
    )
    return 0


def _rounds(
    servers: Mapping[str, Server], texts: Sequence[str], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Both servers once per round, the first one changing; only one works at a time."""
    names = list(servers)
    for number in range(args.rounds):
        result: dict[str, Any] = {"order": list(names), "idle_cpu_share": {}}
        for name in names:
            idle = servers[next(other for other in names if other != name)]
            time.sleep(SETTLE_SECONDS)
            with _frozen(idle, args.freeze_idle):
                before, began = cpu_seconds(idle.process.pid), time.perf_counter()
                result[name] = _turn(servers[name], texts, args).to_json()
                used = cpu_seconds(idle.process.pid) - before
            result["idle_cpu_share"][name] = used / (time.perf_counter() - began)
        names.reverse()
        speeds = {name: f"{result[name]['decode_tokens_per_s']:.2f}" for name in servers}
        console.print(f"round {number + 1}: {speeds}")
        yield result


def _turn(server: Server, texts: Sequence[str], args: argparse.Namespace) -> Turn:
    ask(server.port, texts[0], 4)  # wakes the server up
    time.sleep(0.1)  # until it is counted
    return take_turn(server, texts, args.tokens)


def _ratios(rounds: Sequence[Mapping[str, Any]], figure: str) -> list[float]:
    return [result["offload"][figure] / result["plain"][figure] for result in rounds]


@contextlib.contextmanager
def _frozen(server: Server, freeze: bool) -> Iterator[None]:
    """Stops all processes of a server for a while, if asked to."""
    if not freeze:
        yield
        return
    os.killpg(server.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(server.process.pid, signal.SIGCONT)


def bootstrap_of_median(
    values: Sequence[float], resamples: int = 20_000, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the median, from a fixed seed."""
    rng = np.random.default_rng(0)
    data = np.asarray(values)
    medians = np.median(rng.choice(data, (resamples, data.size)), axis=1)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(medians, [tail, 100 - tail])
    return float(low), float(high)


# ---- llamacpp-shape ------------------------------------------------------------------------


def llamacpp_shape(args: argparse.Namespace) -> int:
    """Decode speed by the share of experts cached, beside llama.cpp's figures."""
    model = ensure_model(args.work_dir, _shape(args))
    cases = []
    for share, mode in itertools.product(args.shares, args.modes):
        console.print(f"{mode}, {share:.0%} of the experts cached")
        cases.append(_serve_share(args, model, share, mode))
    table = Table(
        title="Decode tokens/s, one request at a time (median of repeats)",
        caption="llama.cpp: measured by others on 2 cores, mmap, the same share of weights in "
        "memory; not measured here",
    )
    columns = (
        "cached",
        "mode",
        "tokens/s",
        "hit rate",
        "MB/token",
        "stall",
        "llama.cpp",
        "ratio",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "mode" else "right")
    for case in cases:
        other = None if args.quick else LLAMACPP.get(case["share"])  # of another shape
        table.add_row(
            f"{case['share']:.0%}",
            case["mode"],
            f"{case['tokens_per_s']['median']:.2f}",
            f"{case['hit_rate']:.1%}",
            f"{case['read_mb_per_token']:.1f}",
            f"{case['stall_share']:.0%}",
            "-" if other is None else f"{other:g}",
            "-" if other is None else f"{case['tokens_per_s']['median'] / other:.2f}",
        )
    console.print(table)
    least = min(args.shares)
    bars = [
        Bar(
            f"tokens/s at {least:.0%} cached, trace / llama.cpp (others' measurement)",
            case["tokens_per_s"]["median"] / LLAMACPP[least],
            5.0,
        )
        for case in cases
        if case["mode"] == "trace" and case["share"] == least and least in LLAMACPP
        if not args.quick  # another shape
    ]
    write_report(
        "llamacpp_shape",
        {
            "parameters": vars(args) | {"shape": _shape(args), "environment": ENVIRONMENT},
            "llamacpp_tokens_per_s": {
                "by_share": {str(share): speed for share, speed in LLAMACPP.items()},
                "source": "measured by others on 2 cores; not measured here",
            },
            "cases": cases,
        },
        bars=bars,
        work_dir=args.work_dir,
        results=results_of(args),
    )
    return 0


def _serve_share(
    args: argparse.Namespace, model: Path, share: float, mode: str
) -> dict[str, Any]:
    options = offload_options(mode, f"{100 * share:g}%", args.work_dir / "store")
    log = _logs(args) / f"share-{mode}-{100 * share:.0f}.log"
    with Server(
        model, serve_options(args, *options), log=log, environment=ENVIRONMENT
    ) as server:
        healthy = server.wait_healthy(900)
        # A cold cache is not what is compared; nor is one that saw the very same requests.
        _sampled_turn(server, args, args.repeats)
        before = offload_counters(server)
        turns = [_sampled_turn(server, args, number) for number in range(args.repeats)]
        after = offload_counters(server)
    change = {name: after[name] - before[name] for name in after}
    speeds = [turn.decode_speed for turn in turns]
    return {
        "share": share,
        "mode": mode,
        "healthy_s": healthy,
        "plan": [line for line in log.read_text().splitlines() if "MoE offload: cache" in line],
        "tokens_per_s": spread(speeds),
        "client_tokens_per_s": spread([turn.client_speed for turn in turns]),
        "samples": [turn.to_json() for turn in turns],
        "counters": change,
        "hit_rate": change["hits"] / max(change["hits"] + change["misses"], 1),
        "read_mb_per_token": change["read_bytes"] / sum(t.tokens for t in turns) / 1e6,
        "stall_share": change["stall_seconds"] / sum(turn.seconds for turn in turns),
        "texts": turns[0].texts,
    }


def _sampled_turn(server: Server, args: argparse.Namespace, number: int) -> Turn:
    """Other prompts for every ``number``.

    Sampled, by default: greedily, the demo model repeats a few words over and over, and a
    cache hits more than it would on text.
    """
    texts = prompts(args.requests, seed=number)
    return take_turn(server, texts, args.tokens, args.temperature)


# ---- start -----------------------------------------------------------------------------------


def start(args: argparse.Namespace) -> int:
    """Second starts against plain vLLM's, and first starts against the raw disk."""
    if os.geteuid() != 0:
        console.print("bench_serving.py start drops the page cache: run it as root")
        return 2
    model = ensure_model(args.work_dir, _shape(args))
    store = args.work_dir / "store-start"
    first = [_first_start(args, model, store, number) for number in range(args.builds)]
    _start_once(args, model, [], "plain-warmup")  # fills the compilation cache
    second = [
        sample
        for condition in args.conditions
        for sample in _second_starts(args, model, store, condition)
    ]
    bars = _start_tables(args, first, second)
    write_report(
        "start",
        {
            "parameters": vars(args) | {"shape": _shape(args), "environment": ENVIRONMENT},
            "first_start": first,
            "second_start": second,
        },
        bars=bars,
        work_dir=args.work_dir,
        results=results_of(args),
    )
    shutil.rmtree(store)
    return 0


def _start_tables(
    args: argparse.Namespace, first: list[dict[str, Any]], second: list[dict[str, Any]]
) -> list[Bar]:
    bars = []
    table = Table(title="Second start: seconds to /health (median)")
    for column in ("page cache", "server", "seconds", "min", "max", "more than plain"):
        table.add_column(column, justify="left" if column == "server" else "right")
    for condition in args.conditions:
        rows = [row for row in second if row["page_cache"] == condition]
        for name in rows[0]["seconds"]:
            figures = spread([row["seconds"][name] for row in rows])
            more = statistics.median(
                row["seconds"][name] - row["seconds"]["plain"] for row in rows
            )
            table.add_row(
                condition, name, *(f"{value:.2f}" for value in figures.values()), f"{more:+.2f}"
            )
            if condition == "warm" and name != "plain":
                title = f"second start, {name}: seconds more than plain vLLM's (median)"
                bars.append(Bar(title, more, 2.0, "s", at_least=False))
    console.print(table)
    table = Table(title="First start: building the store, caches dropped")
    for column in ("build s", "raw read s", "raw write s", "ratio", "/health s"):
        table.add_column(column, justify="right")
    for row in first:
        table.add_row(
            f"{row['build_s']:.2f}",
            f"{row['raw_read_s']:.2f}",
            f"{row['raw_write_s']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['healthy_s']:.1f}",
        )
    console.print(table)
    if first:
        ratio = statistics.median(row["ratio"] for row in first)
        title = "first start: build time / (raw read + raw write), median"
        bars.append(Bar(title, ratio, 1.3, at_least=False))
    return bars


def _start_once(
    args: argparse.Namespace, model: Path, options: Sequence[str], name: str
) -> tuple[float, dict[str, float], str]:
    """Seconds to /health, times of the build's log lines, the log."""
    log = _logs(args) / f"start-{name}.log"
    with Server(
        model, serve_options(args, *options), log=log, environment=ENVIRONMENT
    ) as server:
        watch = LogWatch(server, BUILD_LOG if options else {})
        healthy = server.wait_healthy(900)
        return healthy, watch.close(), server.log


def _second_starts(
    args: argparse.Namespace, model: Path, store: Path, condition: str
) -> Iterator[dict[str, Any]]:
    kinds: dict[str, list[str]] = {"plain": []}
    for cache in args.caches:
        kinds[f"cache_gb={cache}"] = offload_options("trace", cache, store)
    names = list(kinds)
    for number in range(args.repeats):
        row: dict[str, Any] = {"page_cache": condition, "order": list(names), "seconds": {}}
        for name in names:
            if condition == "dropped":
                drop_caches()
            else:
                warm_page_cache(model)
            label = re.sub(r"\W+", "", name)
            seconds, _, log = _start_once(args, model, kinds[name], label)
            if kinds[name] and "store" not in log:
                raise RuntimeError(f"{name}: the log says nothing of a store:\n{log[-3000:]}")
            if BUILD_LOG["begin"] in log:
                raise RuntimeError(f"{name} built the store again:\n{log[-3000:]}")
            row["seconds"][name] = seconds
            console.print(f"{condition} {number + 1}: {name} {seconds:.2f} s")
        names = names[1:] + names[:1]
        yield row


def _first_start(
    args: argparse.Namespace, model: Path, store: Path, number: int
) -> dict[str, Any]:
    """Builds a store with caches dropped, between raw reads and writes of its bytes."""
    shutil.rmtree(store, ignore_errors=True)
    files = sorted(model.glob("*.safetensors"))
    raw: dict[str, list[float]] = {"read": [], "write": []}
    size = _expert_bytes(_shape(args))

    def measure_raw() -> None:
        drop_caches()
        read_bytes = sum(path.stat().st_size for path in files)
        raw["read"].append(raw_read_seconds(files) * size / read_bytes)
        raw["write"].append(raw_write_seconds(args.work_dir / "raw.bin", size))

    measure_raw()
    drop_caches()
    options = offload_options("trace", args.caches[0], store)
    healthy, seconds, log = _start_once(args, model, options, f"first-{number}")
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
    import mmap

    region = mmap.mmap(-1, _BLOCK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    region.madvise(mmap.MADV_HUGEPAGE)
    region[:] = os.urandom(_BLOCK_BYTES)
    return memoryview(region)


# ---- command line --------------------------------------------------------------------------


def _shape(args: argparse.Namespace) -> dict[str, int]:
    return QUICK_SHAPE if args.quick else LLAMACPP_SHAPE


def _expert_bytes(shape: Mapping[str, int]) -> int:
    return 6 * shape["layers"] * shape["experts"] * shape["hidden"] * shape["intermediate"]


def _logs(args: argparse.Namespace) -> Path:
    directory: Path = args.work_dir / "logs"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Options of every benchmark that starts servers."""
    add_common_options(parser)
    parser.add_argument("--eager", action="store_true", help="serve with --enforce-eager")


def build_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")

    one = commands.add_parser("resident", help=resident.__doc__)
    one.set_defaults(run=resident)
    add_server_options(one)
    one.add_argument("--rounds", type=int, default=30)
    one.add_argument("--requests", type=int, default=2, help="per server and round")
    one.add_argument("--tokens", type=int, default=96, help="generated per request")
    one.add_argument(
        "--freeze-idle",
        action="store_true",
        help="SIGSTOP the server that is not measured (its CPU use is reported either way)",
    )

    two = commands.add_parser("llamacpp-shape", help=llamacpp_shape.__doc__)
    two.set_defaults(run=llamacpp_shape)
    add_server_options(two)
    two.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.55, 0.36])
    two.add_argument("--modes", nargs="+", default=["trace", "lrfu", "lru"])
    two.add_argument("--repeats", type=int, default=5)
    two.add_argument("--requests", type=int, default=4, help="per repeat")
    two.add_argument("--tokens", type=int, default=64, help="generated per request")
    two.add_argument("--temperature", type=float, default=1.0, help="0: greedy")

    three = commands.add_parser("start", help=start.__doc__)
    three.set_defaults(run=start)
    add_server_options(three)
    three.add_argument("--repeats", type=int, default=5, help="starts of each kind")
    three.add_argument("--builds", type=int, default=3, help="first starts")
    three.add_argument("--caches", nargs="+", default=["50%", "100%"], help="cache_gb values")
    three.add_argument(
        "--conditions", nargs="+", choices=("warm", "dropped"), default=["warm", "dropped"]
    )
    return parser


def main() -> int:
    """See the module's docstring."""
    args = build_parser().parse_args()
    end_on_sigterm()
    if args.quick:
        args.eager = True
        small = {
            "rounds": 2,
            "requests": 1,
            "tokens": 16,
            "repeats": 1,
            "builds": 1,
            "shares": [0.36],
            "modes": ["trace"],
            "caches": ["50%"],
            "conditions": ["warm"],
        }
        for name, value in small.items():
            if hasattr(args, name):
                setattr(args, name, value)
    run = args.run
    del args.run  # a function has no place in a report
    status: int = run(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
