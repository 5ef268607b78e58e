"""Will it fit on several ranks? Each planned like a server of its own, with options they share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from vllm_moe_offload.plan.fit import KV_BLOCK_TOKENS, Fit, fit, with_shared_options
from vllm_moe_offload.plan.links import SharedBound, shared_bound
from vllm_moe_offload.plan.machine import HOST_RUNTIME_BYTES, Machine
from vllm_moe_offload.plan.problems import Problem
from vllm_moe_offload.plan.shapes.base import ModelShape
from vllm_moe_offload.plan.shapes.kernel_form import refusals
from vllm_moe_offload.plan.split import Split, rank_shape, stage_layers

_WHOLE_EXPERTS = "--expert-parallel (ranks have whole experts), another --tensor-parallel-size"


@dataclass(frozen=True, slots=True)
class RankKind:
    """Ranks that need the same.

    Attributes:
        ranks: their numbers, from 0.
        layers: decoder layers that they have.
        fit: of one of them.
    """

    ranks: tuple[int, ...]
    layers: range
    fit: Fit


@dataclass(frozen=True, slots=True)
class NodeNeed:
    """What one node must have.

    Attributes:
        node: its number, from 0.
        ranks: that run there.
        host_bytes: RAM of a server that runs.
        build_bytes: RAM while all its ranks build their stores.
        store_bytes: on its own disk (``store_dir``).
    """

    node: int
    ranks: range
    host_bytes: int
    build_bytes: int
    store_bytes: int


@dataclass(frozen=True)
class ClusterFit:
    """A model on several ranks.

    Attributes:
        shape: the whole model.
        split: how it is shared.
        fits: of each rank.
        problems: why it cannot work; empty if it can.
    """

    shape: ModelShape
    split: Split
    fits: tuple[Fit, ...]
    problems: tuple[Problem, ...]

    @cached_property
    def kinds(self) -> tuple[RankKind, ...]:
        """Ranks by what they need, in order: of a stage one kind, or two with a remainder."""
        found: dict[tuple[int, int], list[int]] = {}
        for rank, fitted in enumerate(self.fits):
            found.setdefault((self.split.stage(rank), fitted.shape.num_experts), []).append(
                rank
            )
        return tuple(
            RankKind(tuple(ranks), self._layers(stage), self.fits[ranks[0]])
            for (stage, _), ranks in found.items()
        )

    @property
    def tightest(self) -> RankKind:
        """The kind that caches the smallest share of its experts; of these, that needs most."""
        return min(
            self.kinds, key=lambda kind: (kind.fit.cached_share, -kind.fit.exact_fast_bytes)
        )

    @property
    def holds_everything(self) -> bool:
        """Whether each rank has a slot for every expert of its own."""
        caches = [fitted.cache for fitted in self.fits]
        return all(cache is not None and cache.holds_everything for cache in caches)

    def nodes(self) -> Iterator[NodeNeed]:
        """What each node must have."""
        for node in range(self.split.nodes):
            ranks = self.split.ranks_of_node(node)
            fits = self.fits[ranks.start : ranks.stop]
            yield NodeNeed(
                node,
                ranks,
                sum(map(_host_bytes, fits)),
                sum(fitted.build_bytes for fitted in fits),
                sum(fitted.store_bytes for fitted in fits),
            )

    def bound(self, hit_rate: float) -> SharedBound:
        """What the links allow."""
        return shared_bound(self.split, self.fits, self.shape.top_k, hit_rate)

    def serve_options(self) -> list[str]:
        """Options of ``vllm serve`` that make this plan."""
        split = self.split
        options = max((kind.fit for kind in self.kinds), key=lambda fit: fit.kv_bytes)
        return [
            *options.serve_options(),
            *_unless_one("--tensor-parallel-size", split.tensor_parallel),
            *_unless_one("--pipeline-parallel-size", split.pipeline_parallel),
            *(["--enable-expert-parallel"] if split.has_expert_parallel else []),
            *(["--distributed-executor-backend", "ray"] if split.nodes > 1 else []),
        ]

    def _layers(self, stage: int) -> range:
        return stage_layers(self.shape.num_layers, stage, self.split.pipeline_parallel)


def fit_cluster(
    shape: ModelShape, node: Machine, split: Split, kv_tokens: int | None = None
) -> ClusterFit:
    """How a model fits on several ranks.

    Args:
        shape: the whole model.
        node: what each node has, and of GPUs what each rank has.
        split: how ranks share the model; ``misfits`` has nothing against it.
        kv_tokens: tokens that the KV cache must hold; by default it gets a quarter of what
            experts and KV cache share on the rank that has least.
    """
    machine = replace(node, ranks=split.ranks_per_node)
    shapes = [rank_shape(shape, split, rank) for rank in range(split.num_ranks)]
    known = {one: fit(one, machine, kv_tokens, split) for one in dict.fromkeys(shapes)}
    worst = max(
        known.values(),
        key=lambda own: (len(own.problems), own.least_fast_bytes, own.build_bytes),
    )
    if not worst.problems:
        known = _with_shared_options(known, kv_tokens)
    fits = tuple(known[one] for one in shapes)
    return ClusterFit(shape, split, fits, tuple(_problems(shape, worst)))


def _with_shared_options(
    known: dict[ModelShape, Fit], kv_tokens: int | None
) -> dict[ModelShape, Fit]:
    """All with the smallest cache and KV cache among them."""
    if len(known) == 1:
        return known
    fits: Sequence[Fit] = list(known.values())
    limited = [fitted.cache_gb for fitted in fits if fitted.cache_gb != "100%"]
    cache_gb = min(limited, key=float) if limited else "100%"
    tokens = kv_tokens
    if tokens is None:
        tokens = min(fitted.kv_tokens for fitted in fits)
        tokens = tokens // KV_BLOCK_TOKENS * KV_BLOCK_TOKENS or tokens
    return {one: with_shared_options(fitted, cache_gb, tokens) for one, fitted in known.items()}


def _problems(shape: ModelShape, fitted: Fit) -> Iterator[Problem]:
    """Of a rank; where only its slices of experts are in the way, the remedy names them."""
    known, platform = shape.format, fitted.machine.platform
    if (
        known is None
        or any(refusals(known, platform, shape.expert))
        or not any(refusals(known, platform, fitted.shape.expert))
    ):
        yield from fitted.problems
        return
    for problem in fitted.problems:
        yield replace(problem, remedy=f"{_WHOLE_EXPERTS}, or {problem.remedy}")


def _host_bytes(fitted: Fit) -> int:
    """RAM that a running rank takes."""
    if fitted.machine.has_gpu:
        return fitted.host_expert_bytes + HOST_RUNTIME_BYTES
    own = fitted.shape.dense_bytes + fitted.machine.runtime_bytes
    return own + fitted.kv_bytes + fitted.cache_bytes


def _unless_one(option: str, value: int) -> list[str]:
    return [] if value == 1 else [option, str(value)]
