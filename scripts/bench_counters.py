"""What it costs to ask workers on other hosts for their counters.

    python scripts/bench_counters.py [--quick] [--poll-only]

One engine, in this process, with two tensor-parallel workers that are made to look as if they were on
another host: the engine core asks them as it would ask those. All experts are cached, so that a step
is as short as it gets and a disturbance weighs the most. In every round it generates the same
tokens three times, four requests at a time: without asking, asking once a second as serving does,
and fifty times a second; which comes first changes from round to round. A fiftieth of what fifty a
second cost is the cost of one, measured fifty times as exactly: the one that is needed where a
machine's speed varies by more than the bar.

Single questions are timed by themselves, too: until it is sent, which is what a step is put off by,
and until both workers, which have nothing else to do, have answered. What a network adds to that is
waited for only when the engine goes idle.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.engine_environment import engine_environment  # noqa: E402
from scripts.harness import remote_rank  # noqa: E402
from scripts.harness.models import ensure_model, shape_of  # noqa: E402
from scripts.harness.options import (  # noqa: E402
    add_server_options,
    end_on_sigterm,
    parser_of,
)
from scripts.harness.pairing import bootstrap_of_median, orders  # noqa: E402
from scripts.harness.report import Bar, report_of  # noqa: E402
from scripts.harness.serving import KV_CACHE_BYTES, SETTLE_SECONDS  # noqa: E402

ARMS = {"never": 0.0, "1 Hz": 1.0, "50 Hz": 50.0}
FASTEST = "50 Hz"
CONCURRENCY = 4
PROMPT_TOKENS = 32
LIMIT_PERCENT = 0.5
POLL_REPEATS = 1000
WORKERS = {
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    remote_rank.RANKS: "0,1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}

console = Console()


def start_engine(args: argparse.Namespace) -> Any:
    """A ``vllm.LLM`` whose engine core runs in this process and asks both workers."""
    os.environ.update({**engine_environment(os.environ), **WORKERS})
    from vllm import LLM

    offload = {"mode": "trace", "cache_gb": "100%", "store_dir": str(args.work_dir / "store")}
    return LLM(
        model=str(ensure_model(args.work_dir, shape_of(args))),
        tensor_parallel_size=2,
        worker_extension_cls=remote_rank.NAME,
        enforce_eager=args.eager,
        max_model_len=1024,
        max_num_seqs=CONCURRENCY,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        enable_prefix_caching=False,
        disable_log_stats=False,
        additional_config={"moe_offload": offload},
    )


def engine_core_of(llm: Any) -> Any:
    """The engine core, which has to be in this process and to have workers elsewhere."""
    engine_core = llm.llm_engine.engine_core.engine_core
    if getattr(engine_core, "moe_offload_remote", None) is None:
        raise RuntimeError("no worker looks as if it were on another host")
    return engine_core


def time_questions(engine_core: Any, repeats: int) -> dict[str, list[float]]:
    """Microseconds of single questions: to send one, and until both workers have answered."""
    executor = engine_core.model_executor
    sent, answered = [], []
    for _ in range(repeats):
        began = time.perf_counter_ns()
        future = executor.collective_rpc("moe_offload_counters", non_block=True)
        sent.append((time.perf_counter_ns() - began) / 1e3)
        future.result()
        answered.append((time.perf_counter_ns() - began) / 1e3)
    return {"sent_us": sent, "answered_us": answered}


def take_turn(llm: Any, remote: Any, args: argparse.Namespace, hertz: float) -> dict[str, Any]:
    """Tokens per second while workers are asked ``hertz`` times a second."""
    from vllm import SamplingParams

    from vllm_moe_offload.integration import remote_counters

    engine_core = llm.llm_engine.engine_core.engine_core
    engine_core.moe_offload_remote = remote if hertz else None
    remote_counters.POLL_SECONDS = 1 / hertz if hertz else float("inf")
    asked = 0
    ask = engine_core.model_executor.collective_rpc

    def count(method: Any, *more: Any, **named: Any) -> Any:
        nonlocal asked
        asked += method == "moe_offload_counters"
        return ask(method, *more, **named)

    prompts = [
        {"prompt_token_ids": [10 + (17 * i + j) % 600 for j in range(PROMPT_TOKENS)]}
        for i in range(args.requests)
    ]
    sampling = SamplingParams(temperature=0.0, max_tokens=args.tokens, ignore_eos=True)
    time.sleep(SETTLE_SECONDS)
    engine_core.model_executor.collective_rpc = count
    try:
        began = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - began
    finally:
        del engine_core.model_executor.collective_rpc
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {"tokens_per_s": tokens / seconds, "seconds": seconds, "asked": asked}


def take_rounds(llm: Any, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A turn of every arm per round, the first one changing."""
    remote = engine_core_of(llm).moe_offload_remote
    take_turn(llm, remote, args, 0.0)  # warm-up
    for number, names in enumerate(orders(list(ARMS), args.rounds)):
        result: dict[str, Any] = {"order": names}
        for name in names:
            result[name] = take_turn(llm, remote, args, ARMS[name])
        console.print(
            f"round {number + 1}, tokens/s (asked): "
            + ", ".join(
                f"{name} {result[name]['tokens_per_s']:.2f} ({result[name]['asked']})"
                for name in ARMS
            )
        )
        yield result


def loss_percent(rounds: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """Throughput lost in one arm, in percent of the same round's turn without asking."""
    losses = [
        100 * (1 - one[name]["tokens_per_s"] / one["never"]["tokens_per_s"]) for one in rounds
    ]
    return {
        "samples": losses,
        "median": statistics.median(losses),
        "confidence_interval_95": bootstrap_of_median(losses),
    }


def bars_of(losses: dict[str, Any], medians: dict[str, float]) -> list[Bar]:
    """What asking once a second may cost."""
    fiftieth = losses[FASTEST]["confidence_interval_95"][1] / ARMS[FASTEST]
    bars = [
        ("throughput lost to asking once a second, median", losses["1 Hz"]["median"]),
        (
            "a fiftieth of what asking 50 times a second costs: upper end of the median's 95 % CI",
            fiftieth,
        ),
        # If nothing of it overlapped with a step, it would take this share of each second.
        (
            "a question and its answers once a second, by themselves",
            100 * medians["answered_us"] / 1e6,
        ),
    ]
    return [Bar(name, value, LIMIT_PERCENT, "%", at_least=False) for name, value in bars]


def main() -> int:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    add_server_options(parser)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--requests", type=int, default=12, help="per turn")
    parser.add_argument("--tokens", type=int, default=128, help="generated per request")
    parser.add_argument("--poll-only", action="store_true", help="only time single questions")
    args = parser.parse_args()
    end_on_sigterm()
    if args.quick:
        args.eager, args.rounds, args.requests, args.tokens = True, 3, 4, 64
    llm = start_engine(args)
    try:
        questions = time_questions(engine_core_of(llm), POLL_REPEATS)
        rounds = [] if args.poll_only else list(take_rounds(llm, args))
    finally:
        llm.llm_engine.engine_core.shutdown()
    medians = {name: statistics.median(values) for name, values in questions.items()}
    console.print(
        f"a question to 2 workers: sent in {medians['sent_us']:.0f} us, answered in "
        f"{medians['answered_us']:.0f} us (medians of {POLL_REPEATS})"
    )
    if args.poll_only:
        return 0
    losses = {name: loss_percent(rounds, name) for name in ARMS if name != "never"}
    for name, loss in losses.items():
        low, high = loss["confidence_interval_95"]
        console.print(
            f"lost to {name}: {loss['median']:.2f} % (median of {len(rounds)} rounds; 95 % CI "
            f"[{low:.2f}, {high:.2f}])"
        )
    medians |= {
        f"{name}, tokens/s": statistics.median(one[name]["tokens_per_s"] for one in rounds)
        for name in ARMS
    }
    report_of(
        args,
        "counters",
        {
            "parameters": vars(args)
            | {"shape": shape_of(args), "concurrency": CONCURRENCY, "environment": WORKERS},
            "samples": rounds,
            "questions": questions,
            "loss_percent": losses,
            "medians": medians,
        },
        bars_of(losses, medians),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
