"""A worker extension that makes ranks strangers to their server's directory, as on another host.

    MOE_OFFLOAD_REMOTE_RANKS=1 vllm serve ... --tensor-parallel-size 2 \\
        --worker-extension-cls scripts.harness.remote_rank.RemoteRank

vLLM imports it in each worker before the model is loaded. What a worker on another host lacks is the
directory that a variable of the environment names, so here the variable goes.
"""

from __future__ import annotations

import multiprocessing
import os

from vllm_moe_offload.integration.counters_dir import ENVIRONMENT

RANKS = "MOE_OFFLOAD_REMOTE_RANKS"
"""Which of the ranks: numbers with commas between."""
NAME = f"{__name__}.RemoteRank"

if multiprocessing.current_process().name in {
    f"VllmWorker-{rank}" for rank in filter(None, os.environ.get(RANKS, "").split(","))
}:
    del os.environ[ENVIRONMENT]


class RemoteRank:
    """Adds nothing to vLLM's worker."""
