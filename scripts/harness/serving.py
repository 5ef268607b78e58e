"""Servers as benchmarks start them: the same options and environment for every one."""

from __future__ import annotations

import argparse
import contextlib
import os
import threading
import time
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from scripts.harness.options import log_path
from scripts.harness.server import Server

SERVED_NAME = "bench"
START_SECONDS = 900
"""What a server may take until it answers."""
KV_CACHE_BYTES = 512 << 20
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""The same for every server: compute on core 0, all else where it likes."""
SETTLE_SECONDS = 1.5
"""vLLM's workers spin for one second after their last message; then they sleep."""


def serve_options(args: argparse.Namespace, *extra: str) -> list[str]:
    """What every server gets, whether it offloads or not."""
    options = [
        "--served-model-name",
        SERVED_NAME,
        "--max-model-len",
        "1024",
        "--max-num-seqs",
        "4",
        "--kv-cache-memory-bytes",
        str(KV_CACHE_BYTES),
        "--no-enable-prefix-caching",
    ]
    if args.eager:
        options.append("--enforce-eager")
    return [*options, *extra]


def offload_options(mode: str, cache: str, store: Path) -> list[str]:
    """The options of a server that offloads."""
    return [
        f"--moe-offload={mode}",
        "--moe-offload-config.cache_gb",
        cache,
        "--moe-offload-config.store_dir",
        str(store),
    ]


def kernel_options(flags: Container[str]) -> list[str]:
    """What a server of quantised experts needs besides on a CPU with these ``flags``.

    vLLM chooses its kernels for them by itself where there is AMX, and only there.
    """
    return [] if "amx_tile" in flags else ["--moe-offload-config.cpu_kernels", "avx512"]


def start_server(
    args: argparse.Namespace,
    model: Path,
    log_name: str,
    options: Sequence[str] = (),
    prefix: Sequence[str] = (),
    *,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Server:
    """A server of ``model`` that starts.

    Args:
        args: the command line.
        model: directory of the checkpoint.
        log_name: of its log, without suffix.
        options: come after those of all servers.
        prefix: goes before the command.
        environment: in which it differs from that of all servers.
    """
    return Server(
        model,
        serve_options(args, *options),
        log=log_path(args, log_name),
        environment={**ENVIRONMENT, **environment},
        prefix=prefix,
    )


def offload_counters(server: Server) -> dict[str, float]:
    """The plugin's counters: hits, misses, read_bytes, stall_seconds."""
    metrics = server.metrics()
    names = ("hits", "misses", "read_bytes", "stall_seconds")
    return {name: metrics[f"vllm:moe_offload_{name}_total"] for name in names}


class LogWatch:
    """Notes when texts first appear in a server's log, to 20 ms; vLLM's log has seconds."""

    def __init__(self, server: Server, texts: Mapping[str, str]) -> None:
        """``texts``: name to what is waited for."""
        self.seconds: dict[str, float] = {}
        self._server = server
        self._texts = dict(texts)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.02) and len(self.seconds) < len(self._texts):
            now, log = time.perf_counter() - self._server.began, self._server.log
            for name, text in self._texts.items():
                if name not in self.seconds and text in log:
                    self.seconds[name] = now

    def close(self) -> dict[str, float]:
        """Seconds since the server's start, by name, as far as the texts were seen."""
        self._stop.set()
        self._thread.join()
        return self.seconds


BUILD_LOG = {"begin": "building the expert store in", "end": "MoE offload: store built:"}
"""Lines around the building of a store: begins to read experts; committed."""


def cpu_seconds(session: int) -> float:
    """CPU time of all living processes of a session (a Server starts one)."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
