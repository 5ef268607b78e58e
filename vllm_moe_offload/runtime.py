"""One per worker: a layer call goes in, slots with the right bytes in them come out.

Wires policy, cache, store and transfer together. Knows nothing of vLLM: the integration
tells it which request each token of a step belongs to, and calls :meth:`begin_layer` and
:meth:`end_layer` around every layer's kernel.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from vllm_moe_offload.cache.planner import (
    MISS_AWAIT,
    MISS_READ,
    PLAN_TRANSIENT,
    ExpertCache,
)
from vllm_moe_offload.cache.pool import SlotPool
from vllm_moe_offload.layer_calls import LayerCalls
from vllm_moe_offload.metrics import Counters
from vllm_moe_offload.policy.base import Policy
from vllm_moe_offload.step import StepTokens, TokenCount
from vllm_moe_offload.trace.collection_file import CollectionFile
from vllm_moe_offload.trace.recorder import TraceRecorder
from vllm_moe_offload.transfer import Transfer, TransferError
from vllm_moe_offload.transfer.prefetch import Prefetcher

logger = logging.getLogger("vllm.moe_offload")


class OffloadRuntime:
    """The expert cache at work.

    Attributes:
        cache: page table and counters.
        pool: the slots that kernels read.
        draft_hits, draft_misses: of those in ``cache``, a drafter's.
        stall_ns: time that layer calls spent waiting for reads.
        published: what other processes see of the counters: those of the end of the last step.
    """

    def __init__(
        self,
        *,
        cache: ExpertCache,
        pool: SlotPool,
        transfer: Transfer,
        policy: Policy,
        prefetcher: Prefetcher | None = None,
        draft_policy: Policy | None = None,
        num_draft_layers: int = 0,
        collection_file: CollectionFile | None = None,
        recorder: TraceRecorder | None = None,
        published: Counters | None = None,
    ) -> None:
        """Wires what is given together.

        Args:
            cache: of all layers, a drafter's behind the model's.
            pool: its slots.
            transfer: fills them.
            policy: of the model's layers, or of all.
            prefetcher: of the model's layers.
            draft_policy: of the drafter's layers, if there are any; may be ``policy``.
            num_draft_layers: how many of the cache's layers those are.
            collection_file: where ``policy`` keeps its activation matrices.
            recorder: of the model's routing.
            published: where counters are written to.
        """
        if draft_policy is not None and draft_policy is not policy:
            draft_policy.bind(cache)
        policy.bind(cache)
        self.cache = cache
        self.pool = pool
        self.policy = policy
        self.stall_ns = 0
        self.busy_ns = 0
        self._token_count = TokenCount()
        self._transfer = transfer
        self.prefetcher = prefetcher
        self._steps = LayerCalls(cache, policy, prefetcher)
        self._passes = None if draft_policy is None else LayerCalls(cache, draft_policy, None)
        self._calls = self._steps  # whose turn it is
        self.draft_hits = 0
        self.draft_misses = 0
        self._copies_ns = 0
        self._collection_file = collection_file
        self._recorder = recorder
        self.published = published
        self._last_layer = cache.shape.num_layers - num_draft_layers - 1
        # Everything fits: a layer's parameters are a view in logical order, ids need no map.
        self._ids_are_slots = cache.shape.holds_everything
        self._step_began_ns = 0
        self._is_dummy = False
        self._warned_of_waves = False
        self._closed = False
        self._publish()  # sizes are of interest before the first request

    # ---- what a layer call on a device has to bring to the host -------------------------

    @property
    def is_dummy(self) -> bool:
        """Whether a :meth:`dummy_run` is open."""
        return self._is_dummy

    @property
    def num_step_tokens(self) -> int | None:
        """Tokens of the step that runs; None if no request stands behind it."""
        return None if self._calls.tokens is None else self._calls.num_tokens

    @property
    def wants_hidden(self) -> bool:
        """Whether the layer calls of the step that runs should be given ``hidden``."""
        return self._prefetcher_of_call is not None

    @property
    def _prefetcher_of_call(self) -> Prefetcher | None:
        """That of the model's steps; drafters and calls that nobody asked for have none."""
        is_step = self._calls is self._steps and self._steps.tokens is not None
        return self.prefetcher if is_step else None

    # ---- steps and requests ----------------------------------------------------------

    def begin_step(self, tokens: StepTokens) -> None:
        """A forward pass for real requests begins; it ends with the last layer."""
        if self._is_dummy:
            return  # a warm-up that went through the scheduler's door
        self._step_began_ns = time.perf_counter_ns()
        self._steps.begin_step(tokens)
        if self._recorder is not None:
            self._recorder.begin_step(tokens)

    def _end_step(self) -> None:
        if self._steps.tokens is None:
            return
        tokens = self._steps.tokens
        self._token_count.end_step(tokens)
        self._steps.end_step()
        if self._recorder is not None:
            self._recorder.end_step()
        self.busy_ns += time.perf_counter_ns() - self._step_began_ns
        self._publish()

    def verify(self, ends: Mapping[str, int]) -> None:
        """Says which drafted tokens of the steps so far are their requests'; before the next step,
        and before :meth:`end_request`. ``ends``: see :meth:`StepTokens.is_verified`."""
        if self._is_dummy:
            return
        self._token_count.verify(ends)
        self.policy.verify(ends)
        if self._recorder is not None:
            self._recorder.verify(ends)

    def end_request(self, request: str) -> None:
        """A request will never run again."""
        if self._is_dummy:
            return
        self.policy.end_request(request)
        if self._collection_file is not None:
            self._collection_file.changed()
        if self._recorder is not None:
            self._recorder.end_request(request)

    @contextlib.contextmanager
    def draft_pass(self, tokens: StepTokens) -> Iterator[None]:
        """While open, layer calls are a drafter's, on these tokens: the last ones of requests, or
        its own guesses behind them.

        They count as hits and misses, and are scored; they are in no trace, since nobody knows yet
        which of the guesses are right. Without layers of the drafter in the cache nothing happens.
        """
        calls = self._passes
        if self._is_dummy or calls is None:
            yield
            return
        began = time.perf_counter_ns()
        hits, misses = self.cache.count("hits"), self.cache.count("misses")
        calls.begin_step(tokens)
        self._calls = calls
        try:
            yield
        finally:
            self._calls = self._steps
            calls.end_step()
            self.draft_hits += self.cache.count("hits") - hits
            self.draft_misses += self.cache.count("misses") - misses
            self.busy_ns += time.perf_counter_ns() - began
            self._publish()

    @contextlib.contextmanager
    def dummy_run(self) -> Iterator[None]:
        """While open, layer calls are for shapes only: nothing is read, counted or kept.

        Their results are thrown away, so any slot will do. (Serving them for real would
        read the whole model at every start.)
        """
        before, self._is_dummy = self._is_dummy, True
        try:
            yield
        finally:
            self._is_dummy = before

    def after_forward(self) -> None:
        """The step's last layer call has ended it already."""

    def go_live(self) -> None:
        """Warm-up is over; :meth:`dummy_run` has told its calls from those that are served."""

    # ---- layer calls -----------------------------------------------------------------

    def begin_layer(
        self,
        layer: int,
        topk_ids: torch.Tensor,
        hidden: torch.Tensor | None = None,
        routed_ids: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Makes the experts of ``topk_ids`` resident; returns their slots.

        Args:
            layer: index among the MoE layers.
            topk_ids: int32 or int64 ``[tokens, top_k]``; tokens beyond the step's and
                ids of -1 are padding or other ranks', for which nothing is fetched or counted.
            hidden: what the router was given, ``[tokens, hidden]``; for prediction only.
            routed_ids: like ``topk_ids``, all that the router chose, where that is more than
                this rank's experts; the recorder's. None: that is ``topk_ids``.

        Returns:
            Slots of the layer's parameters, shaped and typed like ``topk_ids``, with those of
            other experts of the call for ids of -1; or None if
            the experts do not fit at once: then :meth:`waves` serves the call. A result
            must be followed by :meth:`end_layer` once the kernel is done.

        Raises:
            TransferError: an expert could not be read; the call left nothing behind.
        """
        if self._is_dummy:
            is_valid = self._ids_are_slots and routed_ids is None
            return topk_ids if is_valid else torch.zeros_like(topk_ids)
        topk_ids = topk_ids.contiguous()
        slot_ids = torch.empty_like(topk_ids)
        planned = self._calls.plan(layer, topk_ids, slot_ids, hidden)
        if self._recorder is not None and self._steps.tokens is not None:
            routed = topk_ids if routed_ids is None else routed_ids
            self._recorder.observe(layer, routed.numpy()[: self._calls.num_tokens])
        if not planned:
            if self.prefetcher is None:
                return None
            self.prefetcher.drop_all()  # slots in flight may be all that was wanting
            if not self._calls.plan_again(layer, topk_ids, slot_ids):
                return None
        self._fill(layer, hidden)
        return self._slots_of_parameters(layer, topk_ids, slot_ids, routed_ids)

    def _slots_of_parameters(
        self,
        layer: int,
        topk_ids: torch.Tensor,
        slot_ids: torch.Tensor,
        routed_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """Slots of the pool as rows of the layer's parameters, which are all or a part of it."""
        if not self._ids_are_slots:
            return slot_ids
        if routed_ids is None:
            return topk_ids
        # Ids are their own slots, but for other ranks', which have a stand-in: of the whole pool, and
        # slot 0 of it, before this layer's, where the call needs nothing.
        return (slot_ids - layer * self.cache.shape.num_experts).clamp_(min=0)

    def end_layer(self, layer: int) -> None:
        """The kernel of the layer is done with its slots."""
        if self._is_dummy:
            return
        self.cache.finish()
        if layer == self._last_layer:
            self._end_step()

    def waves(
        self, layer: int, topk_ids: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Serves a layer whose experts do not fit at once, some experts at a time.

        Follows a :meth:`begin_layer` that returned None. Yields, per wave, slots like
        ``topk_ids`` and a bool mask of the entries that belong to the wave (the others
        point at a valid slot and must weigh nothing). The consumer runs the kernel before
        it asks for the next wave. Ends the layer by itself.
        """
        self._warn_of_waves()
        ids = topk_ids.contiguous().numpy()
        num_tokens, flags = self._calls.extent(ids)
        for _ in self.cache.waves(layer, ids[:num_tokens], flags):
            self._read_misses(layer)
            # One more entry than experts, the last: NO_EXPERT is in no wave.
            slots = np.full(self.cache.shape.num_experts + 1, self.cache.slots[0], ids.dtype)
            slots[self.cache.experts] = self.cache.slots
            in_wave = np.zeros(self.cache.shape.num_experts + 1, np.bool_)
            in_wave[self.cache.experts] = True
            yield torch.from_numpy(slots[ids]), torch.from_numpy(in_wave[ids])
        if layer == self._last_layer:
            self._end_step()

    def _warn_of_waves(self) -> None:
        if not self._warned_of_waves:
            self._warned_of_waves = True
            logger.warning(
                "MoE offload: the cache (%d slots) is smaller than what one layer call needs; "
                "such calls run in waves, and their output equals plain vLLM's only up to the "
                "rounding of a split sum. For exact output raise cache_gb to one layer at least.",
                self.cache.shape.num_pool_slots,
            )

    def _fill(self, layer: int, hidden: torch.Tensor | None) -> None:
        """Reads what the open plan misses, and begins prefetches meanwhile."""
        self._copies_ns = 0
        if self.cache.outcome.num_misses:
            self._read_misses(layer, self._prefetcher_of_call, hidden)
        else:
            self._calls.read_ahead(layer, hidden)
        # On a device the kernel still waits for its misses, and the link has no room meanwhile.
        self._calls.slots_are_ready(in_ns=self._copies_ns)

    def _read_misses(
        self,
        layer: int,
        prefetcher: Prefetcher | None = None,
        hidden: torch.Tensor | None = None,
    ) -> None:
        experts, slots, kinds = (array.tolist() for array in self.cache.misses)
        if not experts:
            return
        began = time.perf_counter_ns()
        planned = list(zip(experts, slots, kinds, strict=True))
        requests = [
            (layer, expert, slot) for expert, slot, kind in planned if kind == MISS_READ
        ]
        awaited = [slot for _, slot, kind in planned if kind == MISS_AWAIT]
        try:
            pending = self._transfer.begin_read(requests)
            if prefetcher is not None:
                for slot in awaited:
                    prefetcher.promote(slot)
                prefetcher.pass_layer(layer)
            # While the disk is busy all this costs nothing, and who stays is decided after it.
            self._calls.policy.catch_up()
            if prefetcher is not None:
                prefetcher.begin(prefetcher.foresee(layer, hidden))
            self._transfer.end_read(pending)
            for _, _, slot in requests:
                self.cache.complete(slot, True)
            if requests and prefetcher is not None and not awaited:
                read_ns = self._transfer.expert_ns
                if read_ns is not None:
                    self._copies_ns = int(read_ns * len(requests))
                else:
                    read_ns = (time.perf_counter_ns() - began) / len(requests)
                prefetcher.measured(read_ns=read_ns)
            for slot in awaited:
                assert self.prefetcher is not None  # nobody else reserves slots
                self.prefetcher.await_slot(slot)
        except TransferError:
            # All reads of the batch ended: finish() empties the slots that were to be filled.
            if self.prefetcher is not None:
                self.prefetcher.settle()
            self.cache.finish()
            self._calls.tokens = None
            raise
        self.stall_ns += time.perf_counter_ns() - began

    def load_everything(self) -> None:
        """Fills a cache that holds all experts, in store order, as plain vLLM's start does."""
        shape = self.cache.shape
        experts = np.arange(shape.num_experts, dtype=np.int32)
        for layer in range(shape.num_layers):
            self.cache.plan(layer, experts, PLAN_TRANSIENT)
            self._read_misses(layer)
            self.cache.finish()
        self.stall_ns = 0
        self._publish()

    # ---- figures ---------------------------------------------------------------------

    @property
    def policy_ns(self) -> int:
        """Time that tracing, scoring and predicting took while nothing was waited for."""
        return self._steps.policy_ns + (self._passes.policy_ns if self._passes else 0)

    @property
    def prefetch_ns(self) -> int:
        """The same of beginning and ending reads ahead."""
        return self._steps.prefetch_ns

    @property
    def num_tokens(self) -> int:
        """Tokens computed for good: without guesses that were wrong."""
        return self._token_count.total

    @property
    def read_bytes(self) -> int:
        """Bytes of records that arrived since start."""
        return self._transfer.read_bytes

    def _publish(self) -> None:
        if self.published is None:
            return
        self.published.write(
            (
                *self.cache.counters.tolist(),
                self.read_bytes,
                self.stall_ns / 1e9,
                self.busy_ns / 1e9,
                self.policy_ns / 1e9,
                self.num_tokens,
                self.draft_hits,
                self.draft_misses,
                self.cache.shape.num_slots,
                self.cache.num_resident,
                self.pool.nbytes,
            )
        )

    def close(self) -> None:
        """Stops reading and finishes the recording; safe to call again.

        Raises:
            ExceptionGroup: what could not be closed; the rest is.
        """
        if self._closed:
            return
        self._closed = True
        parts = (self.published, self._recorder, self._collection_file, self._transfer)
        errors = []
        for close in (self._publish, *(part.close for part in parts if part is not None)):
            try:
                close()
            except Exception as error:  # noqa: BLE001 (raised below, with the others)
                errors.append(error)
        if errors:
            raise ExceptionGroup("the expert cache did not close", errors)
