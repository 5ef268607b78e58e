"""Environment of the engines that benchmarks and tests start: no network, no questions asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

OFFLINE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
LOOPBACK = {
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}
"""An engine talks to itself only. On a machine whose one interface is loopback, vLLM and its
libraries would look for another one."""
NO_COMPILER = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
"""That sampler compiles itself with nvcc when it is first used. Here sampling is greedy."""
CACHES = {
    "XDG_CACHE_HOME": "cache",
    "XDG_CONFIG_HOME": "config",
    "TRITON_CACHE_DIR": "triton-cache",
    "TORCHINDUCTOR_CACHE_DIR": "inductor-cache",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "HF_HOME": "huggingface",
}
"""Folders that engines write to and would otherwise put in the home directory or in /tmp."""


def compiler_environment(backend: str | None) -> dict[str, str]:
    """What goes with a backend of vLLM's compilation; None is its default, Inductor.

    Nothing is compiled ahead of time for ``eager``, but unless that is said vLLM computes the key
    of the compilation cache, a hash of its whole configuration, at every step that is not one
    full CUDA graph: milliseconds.
    """
    return {"VLLM_USE_AOT_COMPILE": "0"} if backend == "eager" else {}


def engine_environment(
    environ: Mapping[str, str], caches: Path | None = None
) -> dict[str, str]:
    """``environ`` with what an engine needs on a machine without network.

    What is offline stays so; what the user chose of the rest stays the user's.

    Args:
        environ: of the process that starts the engine.
        caches: folder to keep all caches below; None: where they are by default.
    """
    folders = {}
    if caches is not None:
        folders = {name: str(caches.absolute() / folder) for name, folder in CACHES.items()}
    return {**LOOPBACK, **NO_COMPILER, **folders, **environ, **OFFLINE}
