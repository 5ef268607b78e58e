"""vLLM's CPU platform with workers on Ray. A module of its own: it is imported by its name only."""

from __future__ import annotations

from vllm.platforms.cpu import CpuPlatform


class RayCpuPlatform(CpuPlatform):
    """Takes one of Ray's ``GPU`` resources for each worker, as vLLM does everywhere else.

    Ray counts cores as ``CPU``, but says with the accelerators only which ones a worker has, and
    that is what vLLM asks it. A node for ``n`` workers is started with ``ray start --num-gpus n``.
    """

    ray_device_key = "GPU"
