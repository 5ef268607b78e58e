"""Which experts are read ahead of their layer: prediction, budget, and what is dropped.

After every layer call the predictor says what the next layers will use. What is likely and
resident is kept until its layer was served; what is likely and absent is read while the
kernel computes, most likely first, as many as the link carries until then. The file reader
begins no prefetch while a demand waits.
"""

from __future__ import annotations

import logging

import torch

from vllm_moe_offload.cache.planner import ExpertCache
from vllm_moe_offload.forecast.predictor import Predictor
from vllm_moe_offload.policy.base import Policy
from vllm_moe_offload.step import IdArray, StepTokens
from vllm_moe_offload.transfer import State, Transfer
from vllm_moe_offload.transfer.device import MOST_QUEUED_PREFETCHES

logger = logging.getLogger("vllm.moe_offload")

Read = tuple[int, int, int]
"""Layer, expert and reserved slot of an expert that is to be read ahead."""

LAYERS_AHEAD = 3
"""Layers for which experts are read ahead."""

MOST_IN_FLIGHT = 8
"""Prefetches under way at a time, however fast the link."""

SMOOTHING = 0.05
"""Weight of the newest measurement in the averages of read and layer times."""


class Prefetcher:
    """Reads ahead for one cache.

    The calls of a step: :meth:`begin_step`; per layer :meth:`collect`, :meth:`observe`,
    then, planned, :meth:`pass_layer`, :meth:`foresee` and :meth:`begin`; :meth:`end_step`.

    Attributes:
        predictor: says what the next layers will use.
        read_ns: average time to read one expert.
        compute_ns: average time from a layer's slots being ready to the next layer's call, by
            the number of bits in the step's number of tokens.
    """

    def __init__(
        self,
        cache: ExpertCache,
        transfer: Transfer,
        policy: Policy,
        predictor: Predictor,
        *,
        most_in_flight: int = MOST_IN_FLIGHT,
    ) -> None:
        """``most_in_flight``: prefetches under way at a time, however fast the link."""
        self.predictor = predictor
        self.read_ns = 0.0
        self.compute_ns: dict[int, float] = {}
        self._size = 0
        self._most_in_flight = most_in_flight
        self._cache = cache
        self._transfer = transfer
        self._policy = policy
        self._flights: dict[int, tuple[int, int]] = {}  # slot -> layer, expert
        self._warned = False

    def begin_step(self, tokens: StepTokens) -> None:
        """A step begins."""
        self._size = tokens.request_of_token.size.bit_length()
        self.predictor.begin_step(tokens)

    def observe(self, layer: int, ids: IdArray) -> None:
        """Layer ``layer`` routed the step's tokens; ids ``[tokens, top_k]``."""
        self.predictor.observe(layer, ids)

    def end_step(self) -> None:
        """All layers of the step ran."""
        self.predictor.end_step()

    def collect(self) -> None:
        """Takes in what arrived; does not wait."""
        if not self._transfer.has_news:
            return
        for ended in self._transfer.poll():
            del self._flights[ended.slot]
            self._cache.complete(ended.slot, ended.state is State.LANDED)
            if ended.state is State.FAILED and not self._warned:
                # Not an error yet: whoever needs the expert reads it again, and raises.
                self._warned = True
                logger.warning("MoE offload: a prefetch failed: %s", ended.error)

    def pass_layer(self, layer: int) -> None:
        """Drops what is under way to ``layer`` and not in its plan."""
        if not self._flights:
            return
        if all(target != layer for target, _ in self._flights.values()):
            return
        needed = set(self._cache.slots.tolist())
        for slot, (target, _) in list(self._flights.items()):
            if target == layer and slot not in needed:
                self._drop(slot)

    def _drop(self, slot: int) -> None:
        if self._transfer.drop(slot):
            del self._flights[slot]
            self._cache.cancel_prefetch(slot)

    def promote(self, slot: int) -> None:
        """The layer call needs the slot now: its read goes before other prefetches."""
        self._transfer.promote(slot)

    def await_slot(self, slot: int) -> None:
        """Waits for a prefetch that the layer call needs.

        Raises:
            TransferError: the expert could not be read.
        """
        del self._flights[slot]
        self._transfer.await_slot(slot)
        self._cache.complete(slot, True)

    def foresee(self, layer: int, hidden: torch.Tensor | None) -> list[Read]:
        """What to read ahead for the layers behind ``layer``, the next one first.

        ``hidden``: what the router of ``layer`` was given. Returns layer, expert and reserved slot
        of each, to be given to :meth:`begin`.
        """
        most = self.room
        if not most:
            return []
        value = self._policy.full_score
        reads = self.predictor.foresee(layer, hidden, self._cache, value, most)
        return [(target, expert, slot) for target, expert, slot in reads.tolist()]

    @property
    def room(self) -> int:
        """Reads that may be begun now."""
        return max(self._budget() - len(self._flights), 0)

    def begin(self, reads: list[Read]) -> None:
        """Begins to read; layer, expert and reserved slot of each, the most urgent first.

        With none too: others may wait for their turn.
        """
        if not (reads or self._flights):
            return
        self._transfer.max_queued_prefetches = max(MOST_QUEUED_PREFETCHES, self._per_layer())
        begun = self._transfer.prefetch(reads)
        for target, expert, slot in reads[:begun]:
            self._flights[slot] = (target, expert)
        for _, _, refused in reads[begun:]:
            self._cache.cancel_prefetch(refused)

    def drop_all(self) -> None:
        """Drops all that is under way; then no slot is in flight."""
        for slot in list(self._flights):
            self._drop(slot)
        self.settle()

    def settle(self) -> None:
        """Waits until nothing is in flight."""
        self._transfer.drain()
        self.collect()

    def measured(
        self, *, read_ns: float | None = None, compute_ns: float | None = None
    ) -> None:
        """Takes in what one read of an expert, or one layer's computing, took."""
        if read_ns is not None:
            self.read_ns += (read_ns - self.read_ns) * (SMOOTHING if self.read_ns else 1.0)
        if compute_ns is not None:
            before = self.compute_ns.get(self._size, compute_ns)
            self.compute_ns[self._size] = before + (compute_ns - before) * SMOOTHING

    def _budget(self) -> int:
        """Reads under way at a time: what the link carries while one layer computes, and two.

        One that the next layer call finds half done, and one that waits behind it, so that
        the link never idles until somebody asks again.
        """
        if not self.read_ns:
            return 1
        return min(2 + self._per_layer(), self._most_in_flight)

    def _per_layer(self) -> int:
        """Reads that the link carries while one layer computes, whole ones."""
        if not self.read_ns:
            return 0
        return int(self.compute_ns.get(self._size, 0.0) / self.read_ns)
