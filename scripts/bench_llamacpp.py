"""This plugin beside llama.cpp: the same weights, and the same share of the experts in memory.

    python -m scripts.upcycle --out build/bench/models/upcycled
    python scripts/bench_llamacpp.py [--quick]

Needs root (memory cgroups), a C++ compiler and, the first time, PyPI: llama-cpp-python is built
from its sdist in an environment of its own below --work-dir, whose llama.cpp also converts the
model. All of it is kept.

Model: the upcycled SmolLM2 (scripts/upcycle), whose routing is that of a language model.
Formats: bf16 on both sides; 4 bits as each side has them: int4 in groups of 64 (scripts/quantize)
and Q4_0, llama.cpp's blocks of 32.

The same bytes: with a share s, each side holds its dense part in full and s of its experts.

    plugin      cache_gb is s of the experts' bytes; a memory cgroup without a limit counts what
                the server takes in all (Python, torch and vLLM with it)
    llama.cpp   maps the file, in a memory cgroup whose limit is what it takes besides the
                experts, plus s of the experts' bytes in the file. The former is counted in a run
                without a limit: the most that it took, less the experts.

At s = 1 neither side has a limit. Before llama.cpp starts, the file is dropped from the page
cache, or pages that somebody else was charged for would come on top of the limit.

Settings: each side's best, by short trials before the first round. Both: one thread that computes,
or as many as cores. llama.cpp repacks 4-bit weights by default, which copies them into anonymous
memory: it is tried with and without where nothing limits, and without where that would only get it
killed. How far the system reads ahead of a page that is missing decides how quick mmap is: under a
limit, what the disk has (8 MiB on some machines) and Linux's usual 128 KiB are tried. (The plugin
reads past the page cache.) llama.cpp of this version has no cache of experts on the CPU;
``--n-cpu-moe`` and the like place experts beside a GPU.

Turns: one request at a time; both sides get the same token ids and make as many tokens, whatever
the text. Tokens/s are (tokens - 1) / (time of the last - time of the first), by the clock of the
process that computes. Contestants take turns, each first in its round; before it counts, each is
asked questions once.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.harness.cgroup import MemoryCgroup, memory_cgroup  # noqa: E402
from scripts.harness.completions import QUESTIONS, questions, take_turn  # noqa: E402
from scripts.harness.engine import EngineProcess  # noqa: E402
from scripts.harness.machine import cpu_flags  # noqa: E402
from scripts.harness.models import GROUP_SIZE, ensure_quantised  # noqa: E402
from scripts.harness.options import (  # noqa: E402
    add_server_options,
    end_on_sigterm,
    log_path,
    parser_of,
)
from scripts.harness.page_cache import read_ahead_of  # noqa: E402
from scripts.harness.pairing import orders, spread  # noqa: E402
from scripts.harness.report import Bar, report_of  # noqa: E402
from scripts.harness.server import Server  # noqa: E402
from scripts.harness.serving import (  # noqa: E402
    ENVIRONMENT,
    START_SECONDS,
    kernel_options,
    offload_counters,
    offload_options,
    start_server,
)
from scripts.llamacpp.install import LlamaCpp, LlamaCppError, install  # noqa: E402
from scripts.llamacpp.limits import (  # noqa: E402
    Setting,
    besides_experts,
    limit_of,
    settings_of,
    unlimited_bytes,
)
from scripts.llamacpp.process import running  # noqa: E402
from scripts.llamacpp.process import take_turn as take_turn_of_llamacpp  # noqa: E402
from scripts.llamacpp.weights import (  # noqa: E402
    BF16,
    Q4_0,
    GgufSizes,
    ensure_gguf,
    sizes_of,
)

LLAMACPP = "llama.cpp"
GGUF_OF = {"bf16": BF16, "int4": Q4_0}
"""llama.cpp's format by ours."""
TRIAL_TOKENS = 8
"""Some settings make a token in ten seconds."""
COLUMNS = ("format", "experts", "contestant", "tokens/s", "least to most", "hits", "MB/token")
CPU_FLAGS = ("avx", "f16c", "fma", "amx")
"""How those flags begin that matter here."""

Case = dict[str, Any]

console = Console()


@dataclass(frozen=True, slots=True)
class Weights:
    """One format of the model.

    Attributes:
        name: of the format, ours.
        directory: the checkpoint that the plugin serves.
        gguf: the file that llama.cpp maps.
        sizes: of that file.
    """

    name: str
    directory: Path
    gguf: Path
    sizes: GgufSizes


@dataclass(frozen=True, slots=True)
class Contest:
    """What all runs share.

    Attributes:
        args: the command line.
        llamacpp: installed.
        prompts: token ids of each question.
        cores: on which threads may run.
    """

    args: argparse.Namespace
    llamacpp: LlamaCpp
    prompts: Mapping[str, list[int]]
    cores: int

    def turn(self, number: int) -> list[list[int]]:
        """Token ids of turn ``number``'s questions, the same for all contestants."""
        return [self.prompts[text] for text in questions(self.args.requests, number)]

    @property
    def turns(self) -> list[list[list[int]]]:
        """One that warms up, with other questions than the next; then those that count."""
        return [self.turn(number) for number in (self.args.repeats, *range(self.args.repeats))]


# ---- contestants -------------------------------------------------------------------------


def run_llamacpp(contest: Contest, weights: Weights, limit: int, setting: Setting) -> Case:
    """All turns of llama.cpp under a limit, bytes."""
    args = contest.args
    with in_cgroup(contest, weights, limit, setting) as (cgroup, process):
        turns = [
            take_turn_of_llamacpp(process, prompts, args.tokens, args.temperature)
            for prompts in contest.turns
        ]
        return {
            "setting": asdict(setting),
            "started": process.ready,
            "samples": turns[1:],
            "cgroup": cgroup.figures(),
            "read_bytes": sum(turn["read_bytes"] for turn in turns[1:]),
        }


@contextmanager
def in_cgroup(
    contest: Contest, weights: Weights, limit: int, setting: Setting
) -> Iterator[tuple[MemoryCgroup, EngineProcess]]:
    """llama.cpp under a limit, bytes."""
    log = log_path(contest.args, f"llamacpp-{weights.name}")
    with (
        memory_cgroup(limit) as cgroup,
        running(cgroup, contest.llamacpp, weights.gguf, setting, log) as process,
    ):
        yield cgroup, process


def run_plugin(
    contest: Contest, weights: Weights, share: float, mode: str, threads: int
) -> Case:
    """All turns of the plugin with a share of the experts cached."""
    args = contest.args
    warm, *counted = contest.turns
    with serving(contest, weights, share, mode, threads) as (cgroup, server):
        take_turn(server, warm, args.tokens, args.temperature)
        before = offload_counters(server)
        turns = [take_turn(server, turn, args.tokens, args.temperature) for turn in counted]
        after = offload_counters(server)
        change = {key: after[key] - before[key] for key in after}
        metrics = server.metrics()
        return {
            "setting": {"threads": threads},
            "slots": metrics["vllm:moe_offload_slots"],
            "cache_bytes": metrics["vllm:moe_offload_cache_bytes"],
            "plan": [x for x in server.log.splitlines() if "MoE offload: cache_gb" in x],
            "samples": [turn.to_json() | {"texts": turn.texts} for turn in turns],
            "cgroup": cgroup.figures(),
            "counters": change,
            "read_bytes": change["read_bytes"],
        }


@contextmanager
def serving(
    contest: Contest, weights: Weights, share: float, mode: str, threads: int
) -> Iterator[tuple[MemoryCgroup, Server]]:
    """A server of the plugin that is healthy, in a cgroup that counts what it takes."""
    args = contest.args
    options = offload_options(mode, f"{100 * share:g}%", args.work_dir / "store")
    if weights.name != "bf16":
        options += kernel_options(cpu_flags())
    with (
        memory_cgroup(unlimited_bytes()) as cgroup,
        start_server(
            args,
            weights.directory,
            f"llamacpp-{mode}-{weights.name}-{100 * share:.0f}",
            options,
            cgroup.prefix,
            environment=computing_on(threads),
        ) as server,
    ):
        server.wait_healthy(START_SECONDS)
        yield cgroup, server


def computing_on(threads: int) -> dict[str, str]:
    """Environment of a vLLM that computes with so many threads, on the first cores."""
    return {"VLLM_CPU_OMP_THREADS_BIND": "0" if threads == 1 else f"0-{threads - 1}"}


# ---- before the rounds ---------------------------------------------------------------------


def count_besides(contest: Contest, weights: Weights) -> Case:
    """A run of llama.cpp without a limit: what it takes besides experts."""
    setting = Setting(contest.cores, repack=False)
    args = contest.args
    with in_cgroup(contest, weights, unlimited_bytes(), setting) as (cgroup, process):
        take_turn_of_llamacpp(process, contest.turn(0), args.tokens, args.temperature)
        figures = cgroup.figures()
    return {
        "cgroup": figures,
        "besides_experts_bytes": besides_experts(figures, weights.sizes),
        "gguf": asdict(weights.sizes),
    }


def choose_threads(contest: Contest, weights: Weights, share: float, mode: str) -> Case:
    """With how many threads the plugin is quickest at a share, and all that were tried."""
    args = contest.args
    warm, counted, *_ = contest.turns
    tried = {}
    for threads in sorted({1, contest.cores}):
        with serving(contest, weights, share, mode, threads) as (_, server):
            take_turn(server, warm[:1], args.tokens, args.temperature)
            turn = take_turn(server, counted[:1], args.tokens, args.temperature)
        tried[threads] = turn.decode_speed
        console.print(f"  {mode}, {threads} threads: {tried[threads]:.2f} tokens/s")
    return {
        "contestant": mode,
        "format": weights.name,
        "share": share,
        "setting": {"threads": max(tried, key=lambda threads: tried[threads])},
        "tried": [{"threads": n, "tokens_per_s": speed} for n, speed in tried.items()],
    }


def choose(contest: Contest, weights: Weights, share: float, limit: int) -> Case:
    """llama.cpp's quickest setting at a share, and all that were tried: one thread, then more."""
    tried = {
        setting: try_setting(contest, weights, limit, setting) for setting in settings_of(share)
    }
    if contest.cores > 1:
        best = max(tried, key=lambda setting: tried[setting])
        more = replace(best, threads=contest.cores)
        tried[more] = try_setting(contest, weights, limit, more)
    return {
        "contestant": LLAMACPP,
        "format": weights.name,
        "share": share,
        "limit_bytes": limit,
        "setting": asdict(max(tried, key=lambda setting: tried[setting])),
        "tried": [asdict(setting) | {"tokens_per_s": tried[setting]} for setting in tried],
    }


def try_setting(contest: Contest, weights: Weights, limit: int, setting: Setting) -> float:
    """llama.cpp's tokens/s in a short turn, after one that warms up."""
    temperature = contest.args.temperature
    warm, counted, *_ = contest.turns
    with in_cgroup(contest, weights, limit, setting) as (_, process):
        take_turn_of_llamacpp(process, warm[:1], 2, temperature)
        turn = take_turn_of_llamacpp(process, counted[:1], TRIAL_TOKENS, temperature)
    speed: float = turn["decode_tokens_per_s"]
    console.print(f"  {setting}: {speed:.2f} tokens/s")
    return speed


# ---- figures -------------------------------------------------------------------------------


def speeds_of(cases: Sequence[Case]) -> list[float]:
    """Tokens/s of all turns."""
    return [turn["decode_tokens_per_s"] for case in cases for turn in case["samples"]]


def summary_of(cases: Sequence[Case]) -> list[Case]:
    """A row per format, share and contestant; the plugin's with its ratio to llama.cpp.

    ``ratios``: of the medians, per round; ``ratio``: of the medians of all turns.
    """
    rows = []
    keys = ("format", "share", "contestant")
    for key in dict.fromkeys(tuple(case[name] for name in keys) for case in cases):
        own = [case for case in cases if tuple(case[name] for name in keys) == key]
        tokens = sum(turn["tokens"] for case in own for turn in case["samples"])
        row: Case = dict(zip(keys, key, strict=True)) | {
            "tokens_per_s": spread(speeds_of(own)),
            "read_mb_per_token": sum(case["read_bytes"] for case in own) / tokens / 1e6,
            "peak_anonymous_bytes": max(c["cgroup"]["peak_anonymous_bytes"] for c in own),
            "peak_page_cache_bytes": max(c["cgroup"]["peak_page_cache_bytes"] for c in own),
        }
        if key[2] != LLAMACPP:
            hits, misses = (
                sum(c["counters"][name] for c in own) for name in ("hits", "misses")
            )
            row["hit_rate"] = hits / max(hits + misses, 1)
            row |= ratios_of(own, [c for c in cases if _beside(c, key)])
        rows.append(row)
    return rows


def _beside(case: Case, key: tuple[Any, ...]) -> bool:
    """Whether llama.cpp ran it, with the format and share of ``key``."""
    return (case["format"], case["share"], case["contestant"]) == (*key[:2], LLAMACPP)


def ratios_of(own: Sequence[Case], theirs: Sequence[Case]) -> Case:
    """Our tokens/s through llama.cpp's, in all and for each round that has both."""
    if not theirs:
        return {}
    by_round = {case["round"]: statistics.median(speeds_of([case])) for case in theirs}
    return {
        "ratio": statistics.median(speeds_of(own)) / statistics.median(speeds_of(theirs)),
        "ratios": [
            statistics.median(speeds_of([case])) / by_round[case["round"]]
            for case in own
            if case["round"] in by_round
        ],
    }


def show(rows: Sequence[Case]) -> None:
    """The table."""
    table = Table(title="Decode tokens/s, one request at a time (median of all turns)")
    for column in COLUMNS:
        justify: Literal["left", "right"] = "left" if column == "contestant" else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    for row in rows:
        speed = row["tokens_per_s"]
        table.add_row(
            row["format"],
            f"{row['share']:.0%}",
            row["contestant"],
            f"{speed['median']:.2f}",
            f"{speed['min']:.2f} to {speed['max']:.2f}",
            f"{row['hit_rate']:.1%}" if "hit_rate" in row else "-",
            f"{row['read_mb_per_token']:.1f}",
        )
    console.print(table)


def bars_of(rows: Sequence[Case]) -> list[Bar]:
    """``trace`` against llama.cpp with the least share of the experts, in each format."""
    least = min(row["share"] for row in rows)
    return [
        Bar(
            f"tokens/s with {least:.0%} of the {row['format']} experts, trace / llama.cpp",
            row["ratio"],
            1.0,
            unit="x",
        )
        for row in rows
        if (row["share"], row["contestant"]) == (least, "trace")
    ]


# ---- the whole -----------------------------------------------------------------------------


def token_ids(model: Path) -> dict[str, list[int]]:
    """Each question as the model's chat template has it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    found = {}
    for text in QUESTIONS:
        said = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        found[text] = tokenizer.encode(prompt, add_special_tokens=False)
    return found


def weights_of(llamacpp: LlamaCpp, model: Path, name: str) -> Weights:
    """The model in one format, for both sides; what is missing is written."""
    directory = model if name == "bf16" else ensure_quantised(model, name)
    gguf = ensure_gguf(llamacpp, model, GGUF_OF[name])
    return Weights(name, directory, gguf, sizes_of(gguf))


def run(args: argparse.Namespace) -> None:
    """Trials, rounds, table and report.

    Raises:
        LlamaCppError: llama.cpp could not be installed, or not convert the model.
        RuntimeError: a contestant ended.
    """
    llamacpp = install(args.work_dir / "llamacpp")
    cores = len(os.sched_getaffinity(0))
    contest = Contest(args, llamacpp, token_ids(args.model), cores)
    formats = [weights_of(llamacpp, args.model, name) for name in args.formats]
    alone = {weights.name: count_besides(contest, weights) for weights in formats}
    settings: dict[tuple[str, float, str], Case] = {}
    for weights, share in itertools.product(formats, args.shares):
        console.print(f"Trying {weights.name}, {share:.0%} of the experts")
        besides = alone[weights.name]["besides_experts_bytes"]
        limit = limit_of(share, besides, weights.sizes, unlimited_bytes())
        settings[weights.name, share, LLAMACPP] = choose(contest, weights, share, limit)
        for mode in args.modes:
            found = choose_threads(contest, weights, share, mode)
            settings[weights.name, share, mode] = found
    before = {"without_limit": alone, "settings": list(settings.values())}
    cases: list[Case] = []
    for number, order in enumerate(orders([*args.modes, LLAMACPP], args.rounds)):
        for weights, share, name in itertools.product(formats, args.shares, order):
            chosen = settings[weights.name, share, name]
            if name == LLAMACPP:
                setting = Setting(**chosen["setting"])
                found = run_llamacpp(contest, weights, chosen["limit_bytes"], setting)
            else:
                threads = chosen["setting"]["threads"]
                found = run_plugin(contest, weights, share, name, threads)
            case = {"round": number, "contestant": name, "format": weights.name}
            cases.append(case | {"share": share} | found)
            speed = statistics.median(speeds_of(cases[-1:]))
            console.print(f"{name}, {weights.name}, {share:.0%}: {speed:.2f} tokens/s")
        # After every round, so that a stop loses one at most.
        report(contest, cases, before, quiet=number + 1 < args.rounds)
    show(summary_of(cases))


def read_ahead_kib(directory: Path) -> int | None:
    """Of the disk, as it was found."""
    setting = read_ahead_of(directory)
    return None if setting is None else int(setting.read_text())


def report(contest: Contest, cases: Sequence[Case], before: Case, *, quiet: bool) -> None:
    """Writes the JSON; ``before``: what was found before the first round."""
    args = contest.args
    rows = summary_of(cases)
    report_of(
        args,
        "llamacpp",
        {
            "parameters": vars(args) | {"group_size": GROUP_SIZE, "environment": ENVIRONMENT},
            "cpu_flags": sorted(flag for flag in cpu_flags() if flag.startswith(CPU_FLAGS)),
            "llamacpp": contest.llamacpp.to_json(),
            "prompts": contest.prompts,
            "read_ahead_kib": read_ahead_kib(args.work_dir),
            "rounds_done": 1 + max(case["round"] for case in cases),
            **before,
            "summary": rows,
            "cases": cases,
        },
        [] if args.quick else bars_of(rows),
        quiet=quiet,
    )


def build_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = parser_of(__doc__)
    add_server_options(parser)
    parser.add_argument("--model", type=Path, help="default: models/upcycled in --work-dir")
    parser.add_argument(
        "--formats", nargs="+", choices=sorted(GGUF_OF), default=list(GGUF_OF), metavar="F"
    )
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.55, 0.36])
    parser.add_argument("--modes", nargs="+", default=["trace"], help="of the plugin")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="turns per process")
    parser.add_argument("--requests", type=int, default=2, help="per turn")
    parser.add_argument("--tokens", type=int, default=64, help="generated per request")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: greedy")
    return parser


def main() -> int:
    """See the module's docstring."""
    parser = build_parser()
    args = parser.parse_args()
    end_on_sigterm()
    if args.quick:
        args.eager, args.rounds, args.repeats, args.requests, args.tokens = True, 1, 1, 1, 16
        args.formats, args.shares = ["bf16"], [0.36]
    args.model = args.model or args.work_dir / "models" / "upcycled"
    for problem in problems_of(args):
        parser.error(problem)
    try:
        run(args)
    except LlamaCppError as error:
        console.print(f"bench_llamacpp.py: {error}", style="red", soft_wrap=True)
        return 1
    return 0


def problems_of(args: argparse.Namespace) -> Iterator[str]:
    """What is wrong with the options or missing for the run, a line each."""
    for share in args.shares:
        if not 0 < share <= 1:
            yield f"--shares {share:g}: a share of the experts lies above 0 and up to 1"
    for name, least in (("rounds", 1), ("repeats", 1), ("requests", 1), ("tokens", 2)):
        if getattr(args, name) < least:
            yield f"--{name} {getattr(args, name)}: it must be at least {least}"
    if not (args.model / "config.json").exists():
        yield f"--model {args.model}: no checkpoint; python -m scripts.upcycle makes one"
    if os.geteuid() != 0:
        yield "llama.cpp is limited by a memory cgroup, which needs root"


if __name__ == "__main__":
    sys.exit(main())
