"""A plan for several ranks: what each of them and each node needs, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_moe_offload.cli.plan_report import (
    experts_table,
    last_lines,
    machine_figures,
    memory_figures,
    memory_table,
    model_figures,
    model_lines,
    sayer,
    way_lines,
)
from vllm_moe_offload.plan.cluster import ClusterFit, RankKind
from vllm_moe_offload.plan.fit import HIT_RATES, Fit
from vllm_moe_offload.plan.problems import Problem, amount


@dataclass(frozen=True, slots=True)
class RankReport:
    """A plan in words.

    Attributes:
        name: of the model.
        source: where its sizes are from.
        is_counted: whether that is the weights' files.
        whole: the model on one node and one rank, for what does not depend on ranks.
        cluster: the figures.
        commands: to paste; empty if it cannot work.
        notes: what the figures assume.
    """

    name: str
    source: str
    is_counted: bool
    whole: Fit
    cluster: ClusterFit
    commands: Sequence[str]
    notes: Sequence[str]

    @property
    def problems(self) -> Sequence[Problem]:
        """Why it cannot work; empty if it can."""
        return self.cluster.problems

    def print(self, console: Console) -> None:
        """For people."""
        cluster, say = self.cluster, sayer(console)
        for line in model_lines(self.name, self.source, self.whole):
            say(line)
        console.print(experts_table(self.whole))
        for line in _split_lines(cluster):
            say(line)
        if not cluster.problems:
            console.print(_ranks_table(cluster))
            say(f"Least room is on rank {cluster.tightest.ranks[0]}:")
            console.print(memory_table(cluster.tightest.fit))
            for line in way_lines(cluster.tightest.fit):
                say(line)
            console.print(_nodes_table(cluster))
            if cluster.holds_everything:
                say("All experts fit: after the start nothing is read.")
            else:
                console.print(_bounds_table(cluster))
                say(
                    "Bounds, one request at a time, without time on the network: no speed that "
                    "was measured."
                )
        for line in last_lines(self.notes, cluster.problems, self.commands):
            say(line)

    def as_dict(self) -> dict[str, Any]:
        """All figures as plain data, units in the names."""
        cluster = self.cluster
        works = not cluster.problems
        bounds = [asdict(bound) for bound in map(cluster.bound, HIT_RATES)] if works else []
        return {
            "works": works,
            "problems": [asdict(problem) for problem in cluster.problems],
            "commands": list(self.commands),
            "notes": list(self.notes),
            "model": {
                "name": self.name,
                "source": self.source,
                "counted_from_files": self.is_counted,
                **model_figures(self.whole),
            },
            "machine": machine_figures(self.whole.machine),
            "split": asdict(cluster.split),
            "ranks": [_kind_figures(kind) for kind in cluster.kinds],
            "nodes": [{**asdict(need), "ranks": list(need.ranks)} for need in cluster.nodes()],
            "bounds": bounds,
        }


def _split_lines(cluster: ClusterFit) -> Iterator[str]:
    """How it is shared."""
    split = cluster.split
    on_each = f"{split.ranks_per_node} of them on each of {split.nodes} nodes"
    where = "on one node" if split.nodes == 1 else on_each
    yield f"{split.num_ranks} ranks, {where}"
    if split.pipeline_parallel > 1:
        yield f"- {split.pipeline_parallel} stages share the layers"
    if split.has_expert_parallel:
        yield f"- {split.tensor_parallel} ranks share a layer: whole experts, slices of the rest"
    elif split.tensor_parallel > 1:
        part = cluster.fits[0].expert_bytes
        yield (
            f"- {split.tensor_parallel} ranks share a layer: slices of everything, "
            f"{part:,} bytes of each expert"
        )


def _ranks_table(cluster: ClusterFit) -> Table:
    table = Table()
    for heading in ("ranks", "layers", "experts"):
        table.add_column(heading)
    for heading in ("dense weights", "KV cache", "cached", "store on disk"):
        table.add_column(heading, justify="right", no_wrap=True)
    for kind in cluster.kinds:
        shape, own = kind.fit.shape, kind.fit
        table.add_row(
            _span(kind.ranks),
            _span(kind.layers),
            f"{len(shape.moe_layers)} x {shape.num_experts}",
            amount(shape.dense_bytes),
            amount(own.kv_bytes),
            f"{own.cached_share:.0%}",
            amount(own.store_bytes),
        )
    return table


def _nodes_table(cluster: ClusterFit) -> Table:
    table = Table()
    for heading in ("node", "ranks"):
        table.add_column(heading)
    for heading in ("host memory", "while stores are built", "stores on disk"):
        table.add_column(heading, justify="right")
    for need in cluster.nodes():
        table.add_row(
            str(need.node),
            _span(need.ranks),
            *map(amount, (need.host_bytes, need.build_bytes, need.store_bytes)),
        )
    return table


def _bounds_table(cluster: ClusterFit) -> Table:
    table = Table()
    for heading in (
        "hit rate",
        "misses per token",
        "MB read per token",
        "by the slowest link",
        "tokens/s at most",
    ):
        table.add_column(heading, justify="right")
    for bound in map(cluster.bound, HIT_RATES):
        table.add_row(
            f"{bound.hit_rate:.0%}",
            f"{bound.misses_per_token:.2f}",
            f"{bound.read_bytes_per_token / 1e6:,.1f}",
            f"{bound.slowest_bytes_per_token / 1e6:,.1f}",
            "" if bound.tokens_per_s is None else f"{bound.tokens_per_s:,.2f}",
        )
    return table


def _span(numbers: Sequence[int]) -> str:
    """Consecutive numbers: ``3``, or ``0-7``."""
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _kind_figures(kind: RankKind) -> dict[str, Any]:
    own = kind.fit
    figures = memory_figures(own)
    if figures["fit"] is not None:
        # A link is shared by ranks, so one rank alone has no bound.
        figures["fit"] = {
            name: value for name, value in figures["fit"].items() if name != "bounds"
        }
    return {
        "ranks": list(kind.ranks),
        "layers": list(kind.layers),
        "moe_layers": len(own.shape.moe_layers),
        "experts_per_layer": own.shape.num_experts,
        "expert_bytes": own.expert_bytes,
        "record_bytes": own.layout.record_bytes,
        "dense_bytes": own.shape.dense_bytes,
        "kv_bytes_per_token": own.shape.kv.bytes_per_token,
        "fast_bytes": own.machine.fast_bytes,
        **figures,
    }
