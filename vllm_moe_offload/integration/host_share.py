"""How much of a CPU server's memory vLLM asks for, where the user left that open.

vLLM's default is 92 % of a memory node for each worker. It refuses to start where less is available,
and several workers on one node would ask for it several times. A cache that sizes itself can do
with what there is.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from vllm.config import CacheConfig
from vllm.utils import cpu_resource_utils

from vllm_moe_offload.config import GIB
from vllm_moe_offload.integration.patching import require

logger = logging.getLogger("vllm.moe_offload")

RESERVE_BYTES = 2 * GIB
"""For front end and engine core, which grow while the workers load."""
RESERVE_SHARE = 0.02
"""Of all memory: what comes and goes on large machines."""


def fit(vllm_config: Any, workers_here: int) -> None:
    """Lowers ``gpu_memory_utilization`` (of RAM, on a CPU) to what a worker can have, and says so.

    Only where it was left at vLLM's default and the KV cache's size is open, too.

    Args:
        vllm_config: of the server.
        workers_here: of its workers, those on this machine.
    """
    config = vllm_config.cache_config
    default = require(CacheConfig, "gpu_memory_utilization")
    if config.gpu_memory_utilization != default or config.kv_cache_memory_bytes is not None:
        return
    nodes = [
        cpu_resource_utils.get_memory_node_info(node)
        for node in cpu_resource_utils.get_visible_memory_node()
    ]
    workers = math.ceil(workers_here / len(nodes))
    share = min(share_of(node.total_memory, node.available_memory, workers) for node in nodes)
    if share >= default:
        return
    config.gpu_memory_utilization = share
    logger.info(
        "MoE offload: gpu_memory_utilization %g -> %g, of RAM, for KV cache and experts: what is "
        "available%s; another share: --gpu-memory-utilization",
        default,
        share,
        f" for each of {workers} workers" if workers > 1 else "",
    )


def share_of(total_bytes: int, available_bytes: int, workers: int) -> float:
    """What each of the workers on a memory node may ask for, of all its memory: hundredths.

    One hundredth at least, for vLLM to refuse by name what cannot work.
    """
    reserve = max(RESERVE_BYTES, RESERVE_SHARE * total_bytes)
    return max(math.floor((available_bytes - reserve) / workers / total_bytes * 100), 1) / 100
