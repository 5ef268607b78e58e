"""What a server has: memories, links, and what of them a model can use."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_moe_offload.config import GIB
from vllm_moe_offload.plan.shapes.kernel_form import Platform

UTILIZATION = 0.92
"""Share of a memory that a server takes: vLLM's default ``gpu_memory_utilization``."""
CPU_RUNTIME_BYTES = 5 * GIB // 2
"""vLLM's processes and activations on a CPU server, for each rank, weights and KV cache aside."""
GPU_RUNTIME_BYTES = 2 * GIB
"""CUDA context, activations and graphs on a GPU."""
HOST_RUNTIME_BYTES = 4 * GIB
"""vLLM's processes in the host memory beside a GPU, for each rank."""

NVME_GBPS = 7.0
PCIE_GBPS = 25.0


@dataclass(frozen=True, slots=True)
class Machine:
    """What a server has.

    Attributes:
        host_bytes: RAM.
        device_bytes: memory of the GPU; None for a CPU server.
        link_gbps: 1e9 bytes per second from where experts lie into fast memory: PCIe with a
            GPU, else the disk.
        disk_gbps: of the disk below the host memory of a GPU server.
        memory_gbps: of the fast memory itself, if computing is to be part of the bound.
        ranks: of the model that share host memory and disk; each has a GPU of its own, if any.
    """

    host_bytes: int
    device_bytes: int | None
    link_gbps: float
    disk_gbps: float = NVME_GBPS
    memory_gbps: float | None = None
    ranks: int = 1

    @property
    def platform(self) -> Platform:
        """Where experts are computed."""
        return "cuda" if self.has_gpu else "cpu"

    @property
    def has_gpu(self) -> bool:
        """Whether fast memory is a GPU's."""
        return self.device_bytes is not None

    @property
    def fast_bytes(self) -> int:
        """What a rank may take of the fast memory."""
        total = self.host_bytes if self.device_bytes is None else self.device_bytes
        return int(total * UTILIZATION) // self.fast_ranks

    @property
    def fast_ranks(self) -> int:
        """Ranks that share one fast memory and the link into it."""
        return 1 if self.has_gpu else self.ranks

    @property
    def store_memory_bytes(self) -> int:
        """What a rank may take of the host memory while it builds its store."""
        return int(self.host_bytes * UTILIZATION) // self.ranks

    @property
    def host_expert_bytes(self) -> int:
        """With a GPU, what host memory has for experts of a rank."""
        return max(0, self.store_memory_bytes - HOST_RUNTIME_BYTES) if self.has_gpu else 0

    @property
    def runtime_bytes(self) -> int:
        """Of the fast memory, what neither weights nor caches of a rank get."""
        return GPU_RUNTIME_BYTES if self.has_gpu else CPU_RUNTIME_BYTES
