"""What a layer call does before anything is read: observe, plan, look ahead.

Most calls find all they need, so this is the hot path: policy, planner and lookahead are asked
in one native call (``csrc/serving.h``) wherever they are native.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import vllm_moe_offload._C  # noqa: F401  (registers the operators)
from vllm_moe_offload.cache import PLAN_TRANSIENT, ExpertCache
from vllm_moe_offload.policy.base import Policy, StepRows
from vllm_moe_offload.predictor import LIKELY
from vllm_moe_offload.prefetch import Prefetcher, Read

_serve_layer = torch.ops.vllm_moe_offload.serve_layer.default
_expert_votes = torch.ops.vllm_moe_offload.expert_votes.default


class LayerCalls:
    """Layer calls of the steps of one runtime.

    Attributes:
        rows: of the step that runs; None: no request stands behind what is called.
        policy_ns: time that tracing, scoring and predicting took while nothing was waited for.
        prefetch_ns: the same of beginning and ending reads ahead.
    """

    def __init__(
        self, cache: ExpertCache, policy: Policy, prefetcher: Prefetcher | None
    ) -> None:
        self.rows: StepRows | None = None
        self.policy_ns = 0
        self.prefetch_ns = 0
        self._cache = cache
        self._policy = policy
        self._prefetcher = prefetcher
        self._row_weights = torch.zeros(0)
        self._votes = torch.zeros(cache.shape.num_experts, dtype=torch.float32)
        self._votes_array = self._votes.numpy()
        self._plan_info = torch.from_numpy(cache.plan_info)
        self._reads = torch.zeros((8, 3), dtype=torch.int32)
        self._observer = 0
        self._ready_ns = 0  # when the last layer's rows were; 0: no layer was called yet

    @property
    def num_tokens(self) -> int:
        """Tokens of the step that runs."""
        return self._row_weights.numel()

    def begin_step(self, rows: StepRows) -> None:
        """A forward pass for real requests begins."""
        began = time.perf_counter_ns()
        self.rows = rows
        self._row_weights = torch.from_numpy(rows.weights)
        self._ready_ns = 0
        self._policy.begin_step(rows)
        if self._prefetcher is not None:
            self._prefetcher.begin_step(rows)
        self.policy_ns += time.perf_counter_ns() - began

    def end_step(self) -> None:
        """All its layers ran."""
        began = time.perf_counter_ns()
        self.rows = None
        self._policy.end_step()
        if self._prefetcher is not None:
            self._prefetcher.end_step()
        self.policy_ns += time.perf_counter_ns() - began

    def extent(self, topk_ids: torch.Tensor | npt.NDArray[Any]) -> tuple[int, int]:
        """Rows of ``topk_ids`` that are tokens, and the flags to plan them with."""
        if self.rows is None:
            return len(topk_ids), PLAN_TRANSIENT
        return self.num_tokens, 0

    def plan(
        self,
        layer: int,
        topk_ids: torch.Tensor,
        slot_ids: torch.Tensor,
        hidden: torch.Tensor | None,
    ) -> bool:
        """Observes and plans; where nothing is missing, names what is to be read ahead.

        Args:
            layer: index among the MoE layers.
            topk_ids: contiguous int32 or int64 ``[tokens or more, top_k]`` in RAM.
            slot_ids: like ``topk_ids``, receives their rows.
            hidden: what the router was given; for prediction only.

        Returns:
            Whether the need fits at once; if not, it was observed all the same.
        """
        if self.rows is None:
            return self.plan_again(layer, topk_ids, slot_ids)
        prefetcher = self._prefetcher
        if prefetcher is not None:
            self._collect(prefetcher)
        began = time.perf_counter_ns()
        if layer == 0:
            top_k = topk_ids.shape[1]
            self._observer = self._policy.native_observer(self.num_tokens, top_k)
        if not self._observer:
            _expert_votes(topk_ids, self._row_weights, self._votes)
            self._policy.observe(layer, self._routing(topk_ids), self._votes_array)
        lookahead = most = 0
        if prefetcher is not None:
            lookahead, most = prefetcher.predictor.native_handle, prefetcher.room
            if not lookahead:
                prefetcher.observe(layer, self._routing(topk_ids))
            if most > len(self._reads):
                self._reads = torch.zeros((most, 3), dtype=torch.int32)
        self.policy_ns += time.perf_counter_ns() - began
        planned = self._serve(
            layer,
            topk_ids,
            slot_ids,
            native=(self._observer, lookahead),
            hidden=hidden,
            max_reads=most,
        )
        self.policy_ns += int(self._cache.plan_info[4])
        return planned

    def plan_again(self, layer: int, topk_ids: torch.Tensor, slot_ids: torch.Tensor) -> bool:
        """Plans what was observed already, or stands for no request."""
        return self._serve(layer, topk_ids, slot_ids)

    def _serve(
        self,
        layer: int,
        topk_ids: torch.Tensor,
        slot_ids: torch.Tensor,
        *,
        native: tuple[int, int] = (0, 0),
        hidden: torch.Tensor | None = None,
        max_reads: int = 0,
    ) -> bool:
        """The call in C++; ``native``: observer and lookahead, each 0 if there is none."""
        num_tokens, flags = self.extent(topk_ids)
        planned: bool = _serve_layer(
            self._cache.handle,
            *native,
            layer,
            topk_ids,
            num_tokens,
            flags,
            self._row_weights,
            hidden,
            LIKELY,
            self._policy.full_score if max_reads else 0.0,
            max_reads,
            slot_ids,
            self._plan_info,
            self._reads,
        )
        return planned

    def _routing(self, topk_ids: torch.Tensor) -> npt.NDArray[Any]:
        """Of the step's tokens, without padding."""
        return topk_ids.numpy()[: self.num_tokens]

    def _collect(self, prefetcher: Prefetcher) -> None:
        """Takes in what was read ahead, and how long the layer before computed."""
        began = time.perf_counter_ns()
        if self._ready_ns:
            prefetcher.measured(compute_ns=max(began - self._ready_ns, 0))
        prefetcher.collect()
        self.prefetch_ns += time.perf_counter_ns() - began

    def read_ahead(self, layer: int, hidden: torch.Tensor | None) -> None:
        """Begins what :meth:`plan`, which found nothing missing, said is to be read ahead."""
        prefetcher = self._prefetcher
        if prefetcher is None or self.rows is None:
            return
        began = time.perf_counter_ns()
        if prefetcher.predictor.native_handle:
            ahead = self._foreseen()
        else:
            ahead = prefetcher.foresee(layer, hidden)
        foreseen = time.perf_counter_ns()
        prefetcher.pass_layer(layer)
        prefetcher.begin(ahead)
        self.policy_ns += foreseen - began
        self.prefetch_ns += time.perf_counter_ns() - foreseen

    def _foreseen(self) -> list[Read]:
        count = int(self._cache.plan_info[3])
        if not count:
            return []
        reads: npt.NDArray[np.int32] = self._reads[:count].numpy()
        return [(layer, expert, row) for layer, expert, row in reads.tolist()]

    def rows_are_ready(self, *, in_ns: int) -> None:
        """The kernel begins in so many nanoseconds: from then on computing hides reads."""
        if self._prefetcher is not None and self.rows is not None:
            self._ready_ns = time.perf_counter_ns() + in_ns
