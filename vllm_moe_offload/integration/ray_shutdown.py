"""Ray kills an engine's workers when it ends; what they keep for the end is written before."""

from __future__ import annotations

import logging
from typing import Any

from vllm_moe_offload.integration.requests import close_runtime

logger = logging.getLogger("vllm.moe_offload")

CLOSE_SECONDS = 60
"""How long workers may take to write what they recorded."""


# WorkerBase.moe_offload_close (v1/worker/worker_base.py)
#   why: actors of Ray are killed without a word, so that GPUModelRunner.shutdown, where workers
#     write traces and activation matrices, is not reached.
#   upstream: RayExecutorV2.shutdown (v1/executor/ray_executor_v2.py) calls ray.kill.
#   remove when: it lets workers shut down, as MultiprocExecutor does.
def install_in_worker() -> None:
    """Adds what :func:`close_workers` calls to vLLM's workers."""
    from vllm.v1.worker.worker_base import WorkerBase

    WorkerBase.moe_offload_close = moe_offload_close


def moe_offload_close(worker: Any) -> None:
    """Ends the worker's runtime; nothing is served after it."""
    close_runtime(worker.model_runner)


def close_workers(executor: Any) -> None:
    """Has all workers of an engine that is well write what they keep. By the thread that steps it."""
    is_well = not getattr(executor, "is_failed", True) and hasattr(executor, "futures_queue")
    if not is_well or not hasattr(executor, "ray_worker_handles"):
        return
    try:
        executor.collective_rpc("moe_offload_close", timeout=CLOSE_SECONDS)
    except (RuntimeError, TimeoutError) as error:
        logger.warning(
            "MoE offload: workers on Ray did not close (%s); what they recorded may be missing",
            error,
        )
