"""Which part of the model this worker has, from vLLM's groups."""

from __future__ import annotations

from typing import Any

from vllm.distributed.parallel_state import get_pp_group, get_world_group
from vllm.distributed.utils import get_pp_indices

from vllm_moe_offload.rank import Rank
from vllm_moe_offload.store.checkpoint_reader import layer_number


def rank_of(layer: Any) -> Rank:
    """This worker's; ``layer``: any of its RoutedExperts."""
    stage, parallel = get_pp_group(), layer.moe_config.moe_parallel_config
    return Rank(
        pp=stage.rank_in_group,
        pp_size=stage.world_size,
        tp=parallel.tp_rank,
        tp_size=parallel.tp_size,
        ep=parallel.ep_rank,
        ep_size=parallel.ep_size,
    )


def first_slice_here(rank: Rank) -> int:
    """Of the workers with slices of the same experts, the first one on this machine: vLLM's workers
    are numbered so that those of a machine follow each other."""
    return max(rank.tp - int(get_world_group().local_rank), 0)


def stages_of(vllm_config: Any) -> tuple[int, ...]:
    """First decoder layer of every pipeline stage, as vLLM divides them
    (``VLLM_PP_LAYER_PARTITION`` is one way to)."""
    num_layers = vllm_config.model_config.get_total_num_hidden_layers()
    size = vllm_config.parallel_config.pipeline_parallel_size
    return tuple(get_pp_indices(num_layers, stage, size)[0] for stage in range(size))


def drafter_stages_of(vllm_config: Any) -> tuple[int, ...]:
    """As :func:`stages_of`, of a drafter: its layers follow the model's. So a store of the one is
    never taken for one of the other, which may come from the same checkpoint."""
    return (int(vllm_config.model_config.get_total_num_hidden_layers()),)


def decoder_layers(layers: list[Any]) -> list[int]:
    """Of a worker's RoutedExperts, their places in the whole model."""
    numbers = [layer_number(f"{layer.layer_name}.") for layer in layers]
    return [number for number in numbers if number is not None]


def own_experts(layers: list[Any]) -> list[int] | None:
    """Which experts of each layer a worker has; None: all."""
    share = layers[0].share
    return None if share is None else share.experts


def ranks_here(vllm_config: Any) -> int:
    """Workers of this server on this machine."""
    parallel = vllm_config.parallel_config
    if parallel.use_ray and parallel.assigned_physical_gpu_ids:
        return len(parallel.assigned_physical_gpu_ids)
    return int(parallel.local_world_size)
