"""What the links of several ranks allow: the slowest of them decides at each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from vllm_moe_offload.plan.fit import Fit
from vllm_moe_offload.plan.split import Split


@dataclass(frozen=True, slots=True)
class SharedBound:
    """What the links allow at a hit rate, one request at a time.

    Attributes:
        hit_rate: share of the experts used that lie in fast memory, the same on each rank.
        misses_per_token: experts of the model that have to be read.
        read_bytes_per_token: by all ranks together.
        slowest_bytes_per_token: by the link that has most to bring, layer by layer: expected.
        tokens_per_s: upper bound; None if nothing is read and computing is left out.
    """

    hit_rate: float
    misses_per_token: float
    read_bytes_per_token: float
    slowest_bytes_per_token: float
    tokens_per_s: float | None


@cache
def expected_most(sizes: tuple[int, ...], drawn: int) -> float:
    """Expected number of drawn experts in the group that has most of them.

    Every set of ``drawn`` of the ``sum(sizes)`` experts is equally likely.

    Args:
        sizes: experts of each group.
        drawn: different experts, at most all.
    """
    all_sets = math.comb(sum(sizes), drawn)
    # The expectation is the sum over m of the chance that some group has more than m.
    return sum(1 - _sets_within(sizes, drawn, most) / all_sets for most in range(drawn))


def _sets_within(sizes: Sequence[int], drawn: int, most: int) -> int:
    """Sets of ``drawn`` experts of which no group has more than ``most``."""
    ways = [1] + [0] * drawn  # by how many are drawn
    for size in sizes:
        of_group = [math.comb(size, own) for own in range(min(most, drawn) + 1)]
        ways = [
            sum(count * ways[total - own] for own, count in enumerate(of_group[: total + 1]))
            for total in range(drawn + 1)
        ]
    return ways[drawn]


def expected_most_missed(sizes: tuple[int, ...], used: int, hit_rate: float) -> float:
    """The same of the misses among ``used`` experts, each missed with the same chance.

    Args:
        sizes: experts of each group.
        used: experts of a layer that a token uses.
        hit_rate: the chance that one of them is not missed.
    """
    return sum(
        math.comb(used, missed)
        * (1 - hit_rate) ** missed
        * hit_rate ** (used - missed)
        * expected_most(sizes, missed)
        for missed in range(1, used + 1)
    )


def shared_bound(split: Split, fits: Sequence[Fit], top_k: int, hit_rate: float) -> SharedBound:
    """What the links of all ranks allow: layers are computed one after the other.

    Ranks of a stage on a node share the node's disk; on a CPU server that is the link, on a GPU
    server each rank has one of its own. Time on the network is left out.

    Args:
        split: how ranks share the model.
        fits: of each rank.
        top_k: experts per token of the whole model.
        hit_rate: share of the experts used that lie in fast memory.
    """
    misses = read_bytes = slowest_bytes = seconds = 0.0
    for number in range(split.pipeline_parallel):
        stage = _Stage(
            split, top_k, {rank: fits[rank] for rank in split.ranks_of_stage(number)}
        )
        record_bytes = stage.any.layout.record_bytes
        missed = (1 - hit_rate) * top_k * stage.num_layers
        misses += missed
        read_bytes += missed * split.expert_slices * record_bytes
        slowest_bytes += stage.most_missed(stage.links, hit_rate) * record_bytes
        seconds += stage.seconds(hit_rate)
    rate = 1 / seconds if seconds else None
    return SharedBound(hit_rate, misses, read_bytes, slowest_bytes, rate)


_Groups = Sequence[Sequence[int]]
"""Ranks that share something."""


@dataclass(frozen=True, slots=True)
class _Stage:
    """Ranks that share layers.

    Attributes:
        split: how ranks share the model.
        top_k: experts per token of the whole model.
        fits: of each rank, by its number.
    """

    split: Split
    top_k: int
    fits: dict[int, Fit]

    @property
    def any(self) -> Fit:
        """Of one of them, for what is the same on all."""
        return next(iter(self.fits.values()))

    @property
    def num_layers(self) -> int:
        """With experts."""
        return len(self.any.shape.moe_layers)

    @property
    def disks(self) -> _Groups:
        """Ranks on the same node."""
        nodes: dict[int, list[int]] = {}
        for rank in self.fits:
            nodes.setdefault(self.split.node(rank), []).append(rank)
        return list(nodes.values())

    @property
    def links(self) -> _Groups:
        """Ranks with the same link into their fast memory."""
        return [[rank] for rank in self.fits] if self.any.machine.has_gpu else self.disks

    def most_missed(self, groups: _Groups, hit_rate: float) -> float:
        """Expected records that a token misses, of the group that misses most, layer by layer."""
        if self.split.expert_ranks == 1:  # each rank has a slice of what is missed
            missed = (1 - hit_rate) * self.top_k
            return missed * max(map(len, groups)) * self.num_layers
        sizes = tuple(
            sum(self.fits[rank].shape.num_experts for rank in group) for group in groups
        )
        return expected_most_missed(sizes, self.top_k, hit_rate) * self.num_layers

    def seconds(self, hit_rate: float) -> float:
        """That a token takes here at least."""
        machine, layout = self.any.machine, self.any.layout
        on_link = self.most_missed(self.links, hit_rate) * layout.record_bytes
        seconds = on_link / (machine.link_gbps * 1e9)
        if machine.has_gpu:
            share = 1 - min(fitted.host_share for fitted in self.fits.values())
            on_disk = self.most_missed(self.disks, hit_rate) * layout.record_bytes * share
            seconds += on_disk / (machine.disk_gbps * 1e9)
        if machine.memory_gbps is not None:
            dense = max(sum(map(self._read_dense, group)) for group in self.links)
            used = self.most_missed(self.links, 0.0) * layout.expert_bytes
            seconds += (dense + used) / (machine.memory_gbps * 1e9)
        return seconds

    def _read_dense(self, rank: int) -> int:
        """Bytes of dense weights of a rank that a token reads."""
        shape = self.fits[rank].shape
        return shape.dense_bytes - shape.lookup_bytes
