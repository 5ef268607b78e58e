"""Who records the routing of a server's requests (``record_trace``), and whether that can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vllm_moe_offload.cache.planner import CacheShape
from vllm_moe_offload.config import GIB, OffloadConfig, OptionError
from vllm_moe_offload.files import FileInUse, FileLock
from vllm_moe_offload.integration.placement import decoder_layers, own_experts
from vllm_moe_offload.rank import Rank
from vllm_moe_offload.trace.recorder import TraceRecorder


def check(vllm_config: Any, options: OffloadConfig) -> None:
    """Raises OptionError if another server records to a file of this one's.

    Workers find it as well, where they run, when the model is loaded.
    """
    if options.record_trace is None:
        return
    stages = vllm_config.parallel_config.pipeline_parallel_size
    for stage in range(stages):
        path = _path(options.record_trace, Rank(pp=stage, pp_size=stages))
        try:
            FileLock(path).release()
        except OSError as error:
            raise _not_possible(options, path, error) from None


def recorder(
    options: OffloadConfig, rank: Rank, shape: CacheShape, layers: list[Any]
) -> TraceRecorder | None:
    """A stage's first worker records what its layers are routed to, other ranks' experts included.

    Args:
        options: the plugin's.
        rank: of the worker.
        shape: of its cache.
        layers: its RoutedExperts, without a drafter's.

    Raises:
        OptionError: the file cannot be written, or another server records to it.
    """
    if options.record_trace is None or rank.tp != 0 or rank.ep != 0:
        return None
    path = _path(options.record_trace, rank)
    numbers = decoder_layers(layers)
    try:
        return TraceRecorder(
            path,
            num_layers=len(layers),
            num_experts=layers[0].global_num_experts,
            top_k=layers[0].top_k,
            layer_ids=np.array(numbers) if len(numbers) == len(layers) else None,
            own_experts=own_experts(layers),
            num_slots=shape.num_slots,
            num_staging_slots=shape.num_staging_slots,
            limit_bytes=int(options.record_trace_limit_gb * GIB),
        )
    except OSError as error:
        raise _not_possible(options, path, error) from error


def _path(record_trace: str, rank: Rank) -> Path:
    return Rank(pp=rank.pp, pp_size=rank.pp_size).trace_file(Path(record_trace))


def _not_possible(options: OffloadConfig, path: Path, error: OSError) -> OptionError:
    reason = str(error)
    if isinstance(error, FileInUse):
        reason = f"another server records to {path}; give another path"
    return OptionError(
        f"moe-offload: record_trace={options.record_trace!r} is not possible: {reason}"
    )
