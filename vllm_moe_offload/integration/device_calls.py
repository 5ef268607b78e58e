"""Layer calls on a device: the routing comes to the host, a slot map goes back.

The planner runs on the host, so a layer call has to wait for its ids: one copy into
page-locked memory and one event. What it misses is copied on other streams; the kernel waits
for that on the device, the host goes on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_moe_offload.forecast.lookahead import sampled_tokens
from vllm_moe_offload.integration.block_slots import ApplyOnSlots, SlotMap
from vllm_moe_offload.runtime import OffloadRuntime

UPLOADS = 8
"""Slot maps that may be on their way to the device at a time: a layer call needs one, one in
waves several."""


class DeviceCalls:
    """Serves the layer calls of one worker's model. Also runs on the CPU device, for tests."""

    def __init__(
        self,
        runtime: OffloadRuntime,
        device: torch.device,
        num_experts: int,
        apply_on_slots: ApplyOnSlots,
    ) -> None:
        """Serves calls of layers of which this worker has ``num_experts``; ``apply_on_slots``:
        their kernel."""
        self._runtime = runtime
        self._apply_on_slots = apply_on_slots
        self._num_experts = num_experts
        self._device = device
        self._pins = device.type == "cuda"
        self._event = torch.cuda.Event() if self._pins else None
        self._staged: dict[str, torch.Tensor] = {}
        self._spread = torch.empty(0, device="cpu")
        self._maps = torch.empty(
            (UPLOADS, num_experts + 1), dtype=torch.int32, device="cpu", pin_memory=self._pins
        )
        self._map_arrays: npt.NDArray[np.int32] = self._maps.numpy()
        self._num_uploads = 0
        self._slot_of = torch.full((num_experts + 1,), -1, dtype=torch.int32, device=device)
        # Dummy runs: any slot is within bounds, and there is always one.
        first = torch.zeros(num_experts + 1, dtype=torch.int32, device=device)
        first[-1] = -1
        self._first_slot = SlotMap(num_experts, first)

    def forward(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
    ) -> torch.Tensor:
        """One call of an offloaded layer.

        Args:
            layer: the RoutedExperts.
            x: ``[tokens, hidden]`` on the device.
            topk_weights, topk_ids: ``[tokens, top_k]`` on the device, ids int32 or int64;
                -1 in tokens beyond the step's.

        Raises:
            TransferError: an expert could not be read.
        """
        runtime = self._runtime
        if runtime.is_dummy:
            return self._apply_on_slots(layer, x, topk_weights, topk_ids, self._first_slot)
        routed, hidden = self._bring(topk_ids, x)
        if layer.share is None:
            ids, others = routed, None
        else:
            ids, others = layer.share.own_ids(routed), routed
        if runtime.begin_layer(layer.moe_layer, ids, hidden, others) is None:
            return self._in_waves(layer, x, topk_weights, topk_ids, ids)
        try:
            return self._apply_on_slots(layer, x, topk_weights, topk_ids, self._upload_plan())
        finally:
            runtime.end_layer(layer.moe_layer)

    def _in_waves(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        ids: torch.Tensor,
    ) -> torch.Tensor:
        """Sum over subsets of the experts, in float32; experts outside a wave add nothing."""
        total = torch.zeros_like(x, dtype=torch.float32)
        for _ in self._runtime.waves(layer.moe_layer, ids):
            total += self._apply_on_slots(
                layer, x, topk_weights, topk_ids, self._upload_plan(is_wave=True)
            )
        return total.to(x.dtype)

    def _bring(
        self, topk_ids: torch.Tensor, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Ids of the step's tokens, and of ``x`` what the prefetcher looks at, on the host.

        Rows beyond the step's are padding of a CUDA graph. Valid until the next call.
        """
        count = self._runtime.num_step_tokens
        if count is None:
            count = topk_ids.shape[0]
        ids = self._stage("ids", topk_ids[:count])
        if not self._runtime.wants_hidden:
            self._wait()
            return ids, None
        sample = torch.from_numpy(sampled_tokens(count))
        if sample.numel() == count:
            hidden = self._stage("hidden", x[:count])
            self._wait()
            return ids, hidden
        rows = self._stage("hidden", x[sample.to(x.device)])
        self._wait()
        return ids, self._spread_rows(rows, sample, count)

    def _stage(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Queues a copy into page-locked memory; the result is there after :meth:`_wait`."""
        buffer = self._staged.get(name)
        if buffer is None or buffer.shape[0] < tensor.shape[0] or buffer.dtype != tensor.dtype:
            with torch.inference_mode(False):
                buffer = torch.empty(
                    tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=self._pins
                )
            self._staged[name] = buffer
        staged = buffer[: tensor.shape[0]]
        staged.copy_(tensor, non_blocking=True)
        return staged

    def _spread_rows(
        self, rows: torch.Tensor, sample: torch.Tensor, count: int
    ) -> torch.Tensor:
        """``[count, hidden]`` of which only the rows in ``sample`` have been touched."""
        width = rows.shape[1]
        if self._spread.numel() < count * width or self._spread.dtype != rows.dtype:
            with torch.inference_mode(False):
                self._spread = torch.empty(count * width, dtype=rows.dtype, device="cpu")
        spread = self._spread[: count * width].view(count, width)
        spread[sample] = rows
        return spread

    def _wait(self) -> None:
        """Until all copies queued so far are done, slot maps included."""
        if self._event is not None:
            self._event.record()
            self._event.synchronize()
        self._num_uploads = 0

    def _upload_plan(self, *, is_wave: bool = False) -> SlotMap:
        """The open plan's experts and their slots.

        Only theirs: other residents are not pinned and may be overwritten while the kernel
        runs. One device tensor is enough, because kernels run in order.
        """
        if self._num_uploads == UPLOADS:
            self._wait()
        cache = self._runtime.cache
        on_host = self._map_arrays[self._num_uploads]
        on_host.fill(-1)
        on_host[cache.experts] = cache.slots
        self._slot_of.copy_(self._maps[self._num_uploads], non_blocking=True)
        self._num_uploads += 1
        return SlotMap(self._num_experts, self._slot_of, is_wave)
