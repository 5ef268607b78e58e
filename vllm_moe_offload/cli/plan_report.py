"""A plan's figures, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from vllm_moe_offload.plan.problems import amount
from vllm_moe_offload.plan.shapes.kernel_form import (
    FORMATS,
    ExpertFormat,
    Platform,
    kernel_form,
    place,
    refusals,
)


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

    def print(self, console: Console) -> None:
        """For people."""

        def say(text: str = "") -> None:
            # Whole lines, as they are: what is to be pasted must not be wrapped or styled.
            console.print(text, soft_wrap=True, markup=False, highlight=False)

        result, shape = self.result, self.result.shape
        say(
            f"{self.name}: {shape.model_type}, {shape.parameters / 1e9:.1f} billion parameters, "
            f"{len(shape.moe_layers)} MoE layers x {shape.num_experts} experts, "
            f"{shape.top_k} per token"
        )
        say(f"Sizes from: {self.source}")
        known = result.format.name
        if result.format.kind != "bf16":
            known += f", as vLLM's kernel on a {place(result.machine.platform)} has them"
        say(f"{shape.total_experts:,} experts of {result.expert_bytes:,} bytes ({known})")
        console.print(_experts_table(result))
        if result.cache is not None:
            console.print(_memory_table(result))
            if result.cache.holds_everything:
                say("All experts fit: after the start nothing is read.")
            else:
                console.print(_bounds_table(result))
                with_memory = result.machine.memory_gbps is not None
                parts = "link and memory" if with_memory else "the link alone"
                say(f"Bounds by {parts}, one request at a time: no speed that was measured.")
        for note in self.notes:
            say(f"- {note}")
        for problem in result.problems:
            say(f"It cannot work: {problem.text}.")
            say(f"  What would: {problem.remedy}.")
        if self.commands:
            say()
        for command in self.commands:
            say(f"    {command}")

    def as_dict(self) -> dict[str, Any]:
        """All figures as plain data, units in the names."""
        return {
            "works": not self.result.problems,
            "problems": [
                {"text": problem.text, "remedy": problem.remedy}
                for problem in self.result.problems
            ],
            "commands": list(self.commands),
            "notes": list(self.notes),
            "model": {
                "name": self.name,
                "source": self.source,
                "counted_from_files": self.is_counted,
                **_model_figures(self.result),
            },
            "machine": _machine_figures(self.result.machine),
            **_memory_figures(self.result),
        }


def _experts_table(result: Fit) -> Table:
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


def _memory_table(result: Fit) -> Table:
    machine, shape, cache = result.machine, result.shape, result.cache
    assert cache is not None
    table = Table(show_header=False)
    table.add_column("what")
    table.add_column("amount", justify="right", no_wrap=True)
    if machine.device_bytes is None:
        total, place = machine.host_bytes, "host memory"
    else:
        total, place = machine.device_bytes, "device memory"
    table.add_row(f"{place}, {UTILIZATION:.0%} of {amount(total)}", amount(machine.fast_bytes))
    table.add_row("  dense weights", amount(shape.dense_bytes))
    table.add_row("  vLLM itself (assumed)", amount(machine.runtime_bytes))
    table.add_row(
        f"  KV cache: {result.kv_tokens:,} tokens of {shape.kv.bytes_per_token:,} bytes",
        amount(result.kv_bytes),
    )
    table.add_row(
        f"  expert cache: {cache.num_slots:,} slots ({_share(result):.0%}) + "
        f"{cache.num_staging_slots} staging slots",
        amount(result.cache_bytes),
    )
    table.add_row(
        f"minimum cache: one token's {shape.top_k} experts of a layer",
        amount(shape.top_k * result.expert_bytes),
    )
    table.add_row(
        f"for exact output: all {shape.num_experts} of a layer",
        amount(shape.num_experts * result.expert_bytes),
    )
    if machine.has_gpu:
        table.add_row(
            f"experts in host memory ({result.host_share:.0%})",
            amount(result.host_expert_bytes),
        )
    table.add_row("host memory while the store is built", amount(result.build_bytes))
    table.add_row("store on disk (store_dir)", amount(result.store_bytes))
    return table


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


def _share(result: Fit) -> float:
    assert result.cache is not None
    return result.cache.num_slots / result.shape.total_experts


def _model_figures(result: Fit) -> dict[str, Any]:
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


def _machine_figures(machine: Machine) -> dict[str, Any]:
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


def _memory_figures(result: Fit) -> dict[str, Any]:
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
        "cached_share": _share(result),
        "holds_everything": cache.holds_everything,
        "exact": result.is_exact,
        "has_run": result.has_run,
        "kv_bytes": result.kv_bytes,
        "kv_tokens": result.kv_tokens,
        "host_expert_bytes": result.host_expert_bytes,
        "bounds": [asdict(bound) for bound in map(result.bound, HIT_RATES)],
    }
