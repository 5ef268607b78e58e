"""A worker extension that tells what the worker itself counts, past the counter file.

    vllm serve ... --worker-extension-cls tests.integration.worker_probe.WorkerProbe

with ``VLLM_SERVER_DEV_MODE=1`` answers ``POST /collective_rpc {"method": "moe_offload_truth"}``.
"""

from __future__ import annotations

import os
from typing import Any

from vllm_moe_offload.cache.planner import COUNTER_NAMES
from vllm_moe_offload.integration.requests import runtime_of


class WorkerProbe:
    """Mixed into vLLM's worker class."""

    model_runner: Any

    def moe_offload_truth(self) -> dict[str, float]:
        """Every exported figure, by metric name, read in the worker where it arises."""
        runtime = runtime_of(self.model_runner)
        assert runtime is not None
        cache = runtime.cache
        counted = {name: cache.count(name) for name in COUNTER_NAMES}
        resident = sum(
            cache.is_resident(layer, expert)
            for layer in range(cache.shape.num_layers)
            for expert in range(cache.shape.num_experts)
        )
        return {
            "hits_total": counted["hits"],
            "misses_total": counted["misses"],
            "draft_hits_total": runtime.draft_hits,
            "draft_misses_total": runtime.draft_misses,
            "bypasses_total": counted["bypasses"],
            "prefetch_issued_total": counted["prefetch_issued"],
            "prefetch_useful_total": counted["prefetch_useful"],
            "prefetch_late_total": counted["prefetch_late"],
            "prefetch_wasted_total": counted["prefetch_wasted"],
            "read_bytes_total": runtime.read_bytes,
            "stall_seconds_total": runtime.stall_ns / 1e9,
            "slots": cache.shape.num_slots,
            "resident_experts": resident,
            "cache_bytes": sum(tensor.nbytes for tensor in runtime.pool.tensors.values()),
            "up": 1,
            "counters_age_seconds": 0,
            "policy_info": 1,
        }

    def moe_offload_process(self) -> dict[str, int]:
        """Which process the worker is."""
        return {"pid": os.getpid()}
