"""What Prometheus costs: throughput of a live server with and without a scrape per second.

    python scripts/bench_scrape.py [--quick]

One server, all experts cached, so that a step is as short as it gets and a disturbance weighs
the most. In every round it answers the same requests three times, four at a time: alone, while
/metrics is read once a second, and ten times a second; which comes first changes from round to
round. What is scraped is everything, vLLM's own metrics with the plugin's. The cost of single
scrapes adds up, so a tenth of what ten a second cost is the cost of one, measured ten times as
exactly: the one that is needed where a machine's speed varies by more than the bar.

The plugin's part is timed by itself, too: reading the counter files of 1 and 8 workers and
writing the text, as an API server does at every scrape; and a worker's write after every step.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.harness.completions import ask, prompts  # noqa: E402
from scripts.harness.models import ensure_model, shape_of  # noqa: E402
from scripts.harness.options import (  # noqa: E402
    add_server_options,
    end_on_sigterm,
    parser_of,
)
from scripts.harness.pairing import bootstrap_of_median, orders  # noqa: E402
from scripts.harness.report import Bar, report_of  # noqa: E402
from scripts.harness.server import HOST, Server  # noqa: E402
from scripts.harness.serving import (  # noqa: E402
    ENVIRONMENT,
    SETTLE_SECONDS,
    START_SECONDS,
    offload_options,
    start_server,
)
from vllm_moe_offload.integration.endpoint import OffloadCollector  # noqa: E402
from vllm_moe_offload.metrics import VALUES, CounterFile  # noqa: E402

ARMS = {"alone": 0.0, "1 Hz": 1.0, "10 Hz": 10.0}
CONCURRENCY = 4
LIMIT_PERCENT = 0.5
DIRECT_REPEATS = 2000

console = Console()


class Scraper:
    """Reads /metrics at a fixed rate over one connection, as Prometheus does."""

    def __init__(self, port: int, hertz: float) -> None:
        self.seconds: list[float] = []
        self.failure: BaseException | None = None
        self._port = port
        self._period_s = 1 / hertz
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=30)
        due = time.perf_counter()
        try:
            while not self._stop.wait(max(0.0, due - time.perf_counter())):
                due += self._period_s
                began = time.perf_counter()
                connection.request("GET", "/metrics")
                answer = connection.getresponse()
                content = answer.read()
                self.seconds.append(time.perf_counter() - began)
                if answer.status != 200 or b"vllm:moe_offload_hits_total" not in content:
                    raise RuntimeError(f"/metrics: status {answer.status}, {content[:200]!r}")
        except (OSError, http.client.HTTPException, RuntimeError) as error:
            self.failure = error  # raised where the turn ends
        finally:
            connection.close()

    def close(self) -> list[float]:
        """Seconds that each scrape took; raises what went wrong in one."""
        self._stop.set()
        self._thread.join()
        if self.failure is not None:
            raise self.failure
        return self.seconds


@contextlib.contextmanager
def scraping(server: Server, hertz: float) -> Iterator[list[float]]:
    """Scrapes while open, if ``hertz`` is not 0; yields the seconds of each scrape."""
    if not hertz:
        yield []
        return
    scraper = Scraper(server.port, hertz)
    try:
        yield scraper.seconds
    finally:
        scraper.close()


def take_turn(
    server: Server, texts: list[str], max_tokens: int, hertz: float
) -> dict[str, Any]:
    """Tokens per second of all requests, :data:`CONCURRENCY` at a time."""
    time.sleep(SETTLE_SECONDS)
    ask(server.port, texts[0], 4)  # wakes the server up
    with ThreadPoolExecutor(CONCURRENCY) as pool, scraping(server, hertz) as scrapes:
        began = time.perf_counter()
        answers = list(pool.map(lambda text: ask(server.port, text, max_tokens), texts))
        seconds = time.perf_counter() - began
    return {
        "tokens_per_s": sum(answer.tokens for answer in answers) / seconds,
        "seconds": seconds,
        "scrape_ms": [1e3 * s for s in scrapes],
    }


def take_rounds(server: Server, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A turn of every arm per round, the first one changing."""
    for number, names in enumerate(orders(list(ARMS), args.rounds)):
        texts = prompts(args.requests, seed=number)
        result: dict[str, Any] = {"order": names}
        for name in names:
            result[name] = take_turn(server, texts, args.tokens, ARMS[name])
        console.print(
            f"round {number + 1}, tokens/s: "
            + ", ".join(f"{name} {result[name]['tokens_per_s']:.2f}" for name in ARMS)
        )
        yield result


def loss_percent(rounds: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """Throughput lost in one arm, in percent of the same round's turn alone."""
    losses = [
        100 * (1 - one[name]["tokens_per_s"] / one["alone"]["tokens_per_s"]) for one in rounds
    ]
    return {
        "samples": losses,
        "median": statistics.median(losses),
        "confidence_interval_95": bootstrap_of_median(losses),
    }


def timed_ms(call: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each call."""
    taken = []
    for _ in range(repeats):
        began = time.perf_counter_ns()
        call()
        taken.append((time.perf_counter_ns() - began) / 1e6)
    return taken


def time_collector(num_workers: int, repeats: int) -> dict[str, Any]:
    """The plugin's share of a scrape, and a worker's write, without a server."""
    with tempfile.TemporaryDirectory() as name:
        files = [
            CounterFile(
                Path(name) / f"rank{rank}of{num_workers}.counters",
                {"model_name": "mistralai/Mixtral-8x7B-v0.1", "engine": "0", "rank": str(rank)},
                {"policy": "trace", "prefetch": "on", "version": "0.0.0"},
            )
            for rank in range(num_workers)
        ]
        values = [1e6 / 3 + index for index in range(len(VALUES))]
        for file in files:
            file.write(values)
        registry = CollectorRegistry()
        registry.register(OffloadCollector(Path(name)))
        return {
            "workers": num_workers,
            "scrape_ms": timed_ms(lambda: generate_latest(registry), repeats),
            "write_ms": timed_ms(lambda: files[0].write(values), repeats),
            "bytes": len(generate_latest(registry)),
        }


def measure_directly() -> list[dict[str, Any]]:
    """The plugin's part with 1 and with 8 workers."""
    direct = [time_collector(n, DIRECT_REPEATS) for n in (1, 8)]
    for result in direct:
        console.print(
            f"{result['workers']} workers: {statistics.median(result['scrape_ms']):.3f} ms per "
            f"scrape (max {max(result['scrape_ms']):.3f}), "
            f"{1e3 * statistics.median(result['write_ms']):.2f} us per step to write"
        )
    return direct


def measure_server(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rounds of a live server."""
    model = ensure_model(args.work_dir, shape_of(args))
    options = offload_options("trace", args.cache, args.work_dir / "store")
    console.print("Starting the server")
    with start_server(args, model, "scrape", options) as server:
        server.wait_healthy(START_SECONDS)
        take_turn(server, prompts(args.requests, seed=-1), args.tokens, 0.0)  # warm-up
        return list(take_rounds(server, args))


def summary(
    rounds: Sequence[dict[str, Any]], direct: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Losses and medians of all that was measured; printed, too."""
    losses = {name: loss_percent(rounds, name) for name in ARMS if name != "alone"}
    for name, loss in losses.items():
        low, high = loss["confidence_interval_95"]
        console.print(
            f"lost to {name}: {loss['median']:.2f} % (median of {len(rounds)} rounds; 95 % CI "
            f"[{low:.2f}, {high:.2f}])"
        )
    medians = {
        f"{name}, tokens/s": statistics.median(one[name]["tokens_per_s"] for one in rounds)
        for name in ARMS
    }
    scrape_ms = statistics.median(ms for one in rounds for ms in one["10 Hz"]["scrape_ms"])
    collector_ms = statistics.median(direct[0]["scrape_ms"])
    console.print(
        f"a scrape took {scrape_ms:.1f} ms under load; {collector_ms:.3f} ms are the plugin's"
    )
    return {
        "loss_percent": losses,
        "direct": direct,
        "medians": medians
        | {
            "scrape_ms_under_load": scrape_ms,
            "collector_ms": collector_ms,
            "write_us": 1e3 * statistics.median(direct[0]["write_ms"]),
        },
    }


def bars_of(found: dict[str, Any]) -> list[Bar]:
    """What one scrape a second may cost."""
    losses = found["loss_percent"]
    tenth = losses["10 Hz"]["confidence_interval_95"][1] / 10
    bars = [
        ("throughput lost to 1 scrape/s, median", losses["1 Hz"]["median"]),
        ("a tenth of what 10 scrapes/s cost: upper end of the median's 95 % CI", tenth),
        (
            # A scrape takes this share of one second of one core, whatever the server does.
            "the plugin's part of 1 scrape/s: share of one core",
            100 * found["medians"]["collector_ms"] / 1e3,
        ),
    ]
    return [Bar(name, value, LIMIT_PERCENT, "%", at_least=False) for name, value in bars]


def main() -> int:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    add_server_options(parser)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--requests", type=int, default=12, help="per turn")
    parser.add_argument("--tokens", type=int, default=128, help="generated per request")
    parser.add_argument("--cache", default="100%", help="cache_gb (default: 100%%)")
    parser.add_argument(
        "--direct-only", action="store_true", help="only time the collector; no server"
    )
    args = parser.parse_args()
    end_on_sigterm()
    if args.quick:
        args.eager, args.rounds, args.requests, args.tokens = True, 3, 4, 64
    direct = measure_directly()
    if args.direct_only:
        return 0
    rounds = measure_server(args)
    found = summary(rounds, direct)
    report_of(
        args,
        "scrape",
        {
            "parameters": vars(args)
            | {
                "shape": shape_of(args),
                "concurrency": CONCURRENCY,
                "environment": ENVIRONMENT,
            },
            "samples": rounds,
            **found,
        },
        bars_of(found),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
