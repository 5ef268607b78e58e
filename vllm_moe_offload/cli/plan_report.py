"""A plan's figures, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_moe_offload.cache.planner import CacheShape
from vllm_moe_offload.plan.fit import (
    BATCH_TOKENS,
    HIT_RATES,
    Bound,
    Fit,
)
from vllm_moe_offload.plan.machine import UTILIZATION, Machine
from vllm_moe_offload.plan.problems import Problem, amount
from vllm_moe_offload.plan.shapes.kernel_form import (
    FORMATS,
    ExpertFormat,
    Platform,
    kernel_form,
    place,
    refusals,
)
from vllm_moe_offload.plan.ways import Way


@dataclass(frozen=True, slots=True)
class Report:
    """A plan in words.

    Attributes:
        name: of the model.
        source: where its sizes are from.
        is_counted: whether that is the weights' files.
        result: the figures.
        commands: to paste; empty if it cannot work.
        notes: what the figures assume.
    """

    name: str
    source: str
    is_counted: bool
    result: Fit
    commands: Sequence[str]
    notes: Sequence[str]

    @property
    def problems(self) -> Sequence[Problem]:
        """Why it cannot work; empty if it can."""
        return self.result.problems

    def print(self, console: Console) -> None:
        """For people."""

        result = self.result
        say = sayer(console)
        for line in model_lines(self.name, self.source, result):
            say(line)
        console.print(experts_table(result))
        if result.cache is not None:
            console.print(memory_table(result))
            for line in way_lines(result):
                say(line)
            if result.cache.holds_everything:
                say("All experts fit: after the start nothing is read.")
            else:
                console.print(_bounds_table(result))
                with_memory = result.machine.memory_gbps is not None
                parts = "link and memory" if with_memory else "the link alone"
                say(f"Bounds by {parts}, one request at a time: no speed that was measured.")
        for line in last_lines(self.notes, result.problems, self.commands):
            say(line)

    def as_dict(self) -> dict[str, Any]:
        """All figures as plain data, units in the names."""
        return {
            "works": not self.result.problems,
            "problems": [asdict(problem) for problem in self.result.problems],
            "commands": list(self.commands),
            "notes": list(self.notes),
            "model": {
                "name": self.name,
                "source": self.source,
                "counted_from_files": self.is_counted,
                **model_figures(self.result),
            },
            "machine": machine_figures(self.result.machine),
            **memory_figures(self.result),
        }


def sayer(console: Console) -> Callable[[str], None]:
    """Prints whole lines, as they are: what is to be pasted must not be wrapped or styled."""
    return lambda text: console.print(text, soft_wrap=True, markup=False, highlight=False)


def model_lines(name: str, source: str, result: Fit) -> Iterator[str]:
    """What the model is."""
    shape = result.shape
    yield (
        f"{name}: {shape.model_type}, {shape.parameters / 1e9:.1f} billion parameters, "
        f"{len(shape.moe_layers)} MoE layers x {shape.num_experts} experts, "
        f"{shape.top_k} per token"
    )
    yield f"Sizes from: {source}"
    known = result.format.name
    if result.format.kind != "bf16":
        known += f", as vLLM's kernel on a {place(result.machine.platform)} has them"
    yield f"{shape.total_experts:,} experts of {result.expert_bytes:,} bytes ({known})"


def last_lines(
    notes: Sequence[str], problems: Sequence[Problem], commands: Sequence[str]
) -> Iterator[str]:
    """What is assumed, what is in the way, what is to be pasted."""
    yield from (f"- {note}" for note in notes)
    for problem in problems:
        yield f"It cannot work: {problem.text}."
        yield f"  What would: {problem.remedy}."
    if commands:
        yield ""
    yield from (f"    {command}" for command in commands)


def experts_table(result: Fit) -> Table:
    """What experts take in each format."""
    shape = result.shape
    table = Table()
    table.add_column("experts in")
    for heading in ("one expert, bytes", f"all {shape.total_experts:,}"):
        table.add_column(heading, justify="right")
    table.add_column("served")
    for row in _expert_rows(result):
        served = (
            "yes" if row.platform == result.machine.platform else f"on a {place(row.platform)}"
        )
        total = amount(row.expert_bytes * shape.total_experts)
        table.add_row(row.format.name, f"{row.expert_bytes:,}", total, served)
    return table


@dataclass(frozen=True, slots=True)
class _ExpertRow:
    """A format in which such experts can be served, and where: as planned for, or elsewhere."""

    format: ExpertFormat
    platform: Platform
    expert_bytes: int


def _expert_rows(result: Fit) -> Iterator[_ExpertRow]:
    here = result.machine.platform
    elsewhere: Platform = "cpu" if here == "cuda" else "cuda"
    expert = result.shape.expert
    for usual in FORMATS:
        known = result.format if result.format.kind == usual.kind else usual
        for platform in (here, elsewhere):
            if not any(refusals(known, platform, expert)):
                nbytes = kernel_form(known, platform, expert).expert_bytes
                yield _ExpertRow(known, platform, nbytes)
                break


def memory_table(result: Fit) -> Table:
    """What a rank's memory holds."""
    machine, shape, cache = result.machine, result.shape, result.cache
    assert cache is not None
    table = Table(show_header=False)
    table.add_column("what")
    table.add_column("amount", justify="right", no_wrap=True)
    if machine.device_bytes is None:
        total, place = machine.host_bytes, "host memory"
    else:
        total, place = machine.device_bytes, "device memory"
    whole = f"{place}, {UTILIZATION:.0%} of {amount(total)}"
    if machine.fast_ranks > 1:
        whole += f" / {machine.fast_ranks} ranks"
    table.add_row(whole, amount(machine.fast_bytes))
    table.add_row("  dense weights", amount(shape.dense_bytes))
    table.add_row("  vLLM itself (assumed)", amount(machine.runtime_bytes))
    table.add_row(
        f"  KV cache: {result.kv_tokens:,} tokens of {shape.kv.bytes_per_token:,} bytes",
        amount(result.kv_bytes),
    )
    slots = f"  expert cache: {cache.num_slots:,} slots ({result.cached_share:.0%})"
    if result.way is None or result.way is Way.HOST:
        slots += f" + {cache.num_staging_slots} staging slots"
    table.add_row(slots, amount(result.cache_bytes))
    if result.way is Way.DEVICE:
        table.add_row("  what the GPU plans with", amount(result.planning_bytes))
    table.add_row(
        f"minimum cache: one token's {shape.top_k} experts of a layer",
        amount(shape.top_k * result.expert_bytes),
    )
    table.add_row(
        f"for exact output: all {shape.num_experts} of a layer",
        amount(shape.num_experts * result.expert_bytes),
    )
    if machine.has_gpu and result.way is not Way.RESIDENT:
        table.add_row(
            f"experts in host memory ({result.host_share:.0%})",
            amount(result.host_expert_bytes),
        )
    table.add_row("host memory while the store is built", amount(result.build_bytes))
    table.add_row("store on disk (store_dir)", amount(result.store_bytes))
    return table


def way_lines(result: Fit) -> Iterator[str]:
    """With a GPU, who decides what lies there, and what that means for CUDA graphs."""
    if result.way is Way.DEVICE:
        yield "The GPU plans its cache, inside vLLM's own CUDA graphs."
    elif result.way is Way.HOST:
        yield f"The host plans the cache, without CUDA graphs: {result.why_host}."
    elif result.way is Way.RESIDENT:
        yield "Layer calls are vLLM's own, in its own CUDA graphs."


def _bounds_table(result: Fit) -> Table:
    table = Table()
    for heading in ("hit rate", "misses per token", "MB read per token", "tokens/s at most"):
        table.add_column(heading, justify="right")
    for bound in map(result.bound, HIT_RATES):
        table.add_row(
            f"{bound.hit_rate:.0%}",
            f"{bound.misses_per_token:.2f}",
            f"{bound.read_bytes_per_token / 1e6:,.1f}",
            _rate(bound),
        )
    return table


def _rate(bound: Bound) -> str:
    return "" if bound.tokens_per_s is None else f"{bound.tokens_per_s:,.2f}"


def model_figures(result: Fit) -> dict[str, Any]:
    """Of the model, as plain data."""
    shape = result.shape
    return {
        "model_type": shape.model_type,
        "experts_in": None if shape.format is None else shape.format.name,
        "parameters": shape.parameters,
        "moe_layers": len(shape.moe_layers),
        "experts_per_layer": shape.num_experts,
        "experts": shape.total_experts,
        "experts_per_token": shape.top_k,
        "expert_bytes": result.expert_bytes,
        "record_bytes": result.layout.record_bytes,
        "formats": [
            {
                "experts_in": row.format.name,
                "platform": row.platform,
                "expert_bytes": row.expert_bytes,
                "all_experts_bytes": row.expert_bytes * shape.total_experts,
            }
            for row in _expert_rows(result)
        ],
        "dense_bytes": shape.dense_bytes,
        "kv_bytes_per_token": shape.kv.bytes_per_token,
        "kv_bytes_per_request": shape.kv.bytes_per_request(BATCH_TOKENS),
        "max_tokens": shape.max_tokens,
    }


def machine_figures(machine: Machine) -> dict[str, Any]:
    """Of the machine, as plain data."""
    return {
        "platform": "cuda" if machine.has_gpu else "cpu",
        "host_bytes": machine.host_bytes,
        "device_bytes": machine.device_bytes,
        "fast_bytes": machine.fast_bytes,
        "runtime_bytes": machine.runtime_bytes,
        "link_gbps": machine.link_gbps,
        "disk_gbps": machine.disk_gbps,
        "memory_gbps": machine.memory_gbps,
    }


def memory_figures(result: Fit) -> dict[str, Any]:
    """What it takes and what it gets, as plain data."""
    shape = result.shape
    return {
        "least_fast_memory_bytes": result.least_fast_bytes,
        "exact_fast_memory_bytes": result.exact_fast_bytes,
        "build_bytes": result.build_bytes,
        "store_bytes": result.store_bytes,
        "minimum_cache_bytes": shape.top_k * result.expert_bytes,
        "exact_cache_bytes": shape.num_experts * result.expert_bytes,
        "fit": None if result.cache is None else _fit_figures(result, result.cache),
    }


def _fit_figures(result: Fit, cache: CacheShape) -> dict[str, Any]:
    return {
        "cache_gb": result.cache_gb,
        "cache_bytes": result.cache_bytes,
        "cache_slots": cache.num_slots,
        "staging_rows": cache.num_staging_slots,
        "way": None if result.way is None else result.way.name.lower(),
        "why_host": result.why_host,
        "planning_bytes": result.planning_bytes,
        "cached_share": result.cached_share,
        "holds_everything": cache.holds_everything,
        "exact": result.is_exact,
        "has_run": result.has_run,
        "kv_bytes": result.kv_bytes,
        "kv_tokens": result.kv_tokens,
        "host_expert_bytes": result.host_expert_bytes,
        "bounds": [asdict(bound) for bound in map(result.bound, HIT_RATES)],
    }
