"""Puts a worker's runtime together once store and layers are known, and says what fits."""

from __future__ import annotations

import logging
import math
import os
import socket
from pathlib import Path
from typing import Any, cast

from vllm_moe_offload import __version__
from vllm_moe_offload.cache.planner import CacheShape, ExpertCache
from vllm_moe_offload.cache.sizing import auto_cache_bytes, cache_shape, cache_slots
from vllm_moe_offload.config import GIB, KEEP_NOTHING, OffloadConfig, parse_cache_size
from vllm_moe_offload.device.followers import Followers
from vllm_moe_offload.forecast.lookahead import RouterLookahead, Routers
from vllm_moe_offload.forecast.predictor import Predictor
from vllm_moe_offload.integration import recording
from vllm_moe_offload.integration.counters_dir import counters_dir
from vllm_moe_offload.integration.experts import Runtime
from vllm_moe_offload.integration.fast_memory import FastMemory, fast_memory
from vllm_moe_offload.integration.placement import (
    decoder_layers,
    first_slice_here,
    own_experts,
)
from vllm_moe_offload.integration.speculation import passes_per_layer
from vllm_moe_offload.integration.start_on_device import (
    DeviceMemory,
    Plan,
    start_on_device,
)
from vllm_moe_offload.metrics import SUFFIX, CounterFile, Counters
from vllm_moe_offload.plan.fit import amount
from vllm_moe_offload.plan.ways import Way
from vllm_moe_offload.policy import TracePolicy
from vllm_moe_offload.policy.drafter import make_policies
from vllm_moe_offload.rank import Rank
from vllm_moe_offload.runtime import OffloadRuntime
from vllm_moe_offload.store import ExpertStore
from vllm_moe_offload.trace.collection_file import CollectionFile
from vllm_moe_offload.transfer.prefetch import LAYERS_AHEAD, Prefetcher

logger = logging.getLogger("vllm.moe_offload")

COLLECTION_NAME = "activations.msgpack"


def start_runtime(
    vllm_config: Any,
    options: OffloadConfig,
    store: ExpertStore,
    layers: list[Any],
    *,
    routers: Routers | None,
    draft_layers: list[Any],
) -> Runtime:
    """Builds pool, cache, transfer and runtime, and points the layers' parameters at the pool.

    Args:
        vllm_config: the worker's.
        options: the plugin's.
        store: of the experts of all layers, the drafter's behind the model's.
        layers: the model's RoutedExperts.
        routers: of these, where they are known, for prediction.
        draft_layers: a drafter's RoutedExperts.
    """
    memory = fast_memory(vllm_config)
    num_slots = _pool_slots(memory, options, store, layers[0])
    whole = CacheShape(store.num_layers, store.num_experts, num_slots)
    way, why = memory.way(whole, store, layers, draft_layers, options)
    _log_plan(options, store, len(draft_layers))
    if way is Way.HOST:
        return _start_on_host(
            vllm_config,
            options,
            store,
            layers,
            memory=memory,
            routers=routers,
            draft_layers=draft_layers,
            num_slots=num_slots,
            why=why,
        )
    line = sizing_line(options.cache_gb, whole, store.layout.expert_bytes, way)
    logger.info("MoE offload: %s", line)
    all_layers = [*layers, *draft_layers]
    policy = None
    if way is Way.DEVICE and options.mode == TracePolicy.name:
        policy = TracePolicy(len(layers), layers[0].local_num_experts)
    followers = Followers(
        policy,
        None if policy is None else _collection_file(options, store, policy, layers),
        recording.recorder(options, store.identity.rank, whole, layers),
    )
    return start_on_device(
        cast(DeviceMemory, memory),
        Plan(way, whole, all_layers, len(layers)),
        options=options,
        store=store,
        followers=followers,
        published=_counter_file(
            vllm_config, options, store.identity.rank, way, reads_ahead=False
        ),
    )


def _start_on_host(
    vllm_config: Any,
    options: OffloadConfig,
    store: ExpertStore,
    layers: list[Any],
    *,
    memory: FastMemory,
    routers: Routers | None,
    draft_layers: list[Any],
    num_slots: int,
    why: str,
) -> OffloadRuntime:
    """The host plans, layer call by layer call."""
    first = layers[0]
    policy, draft_policy = make_policies(
        options.mode,
        len(layers),
        len(draft_layers),
        first.local_num_experts,
        passes_per_layer(vllm_config),
    )
    shape = cache_shape(
        num_slots,
        num_layers=store.num_layers,
        num_experts=store.num_experts,
        top_k=first.top_k,
        rules=policy.rules,
    )
    line = sizing_line(options.cache_gb, shape, store.layout.expert_bytes, Way.HOST, why)
    logger.info("MoE offload: %s", line)
    pool, transfer = memory.build(store, shape, options)
    cache = ExpertCache(shape, policy.rules)
    predictor = _predictor(options, shape, routers, first.top_k)
    prefetcher = None
    if predictor is not None:
        most = memory.most_prefetches(store.num_experts)
        prefetcher = Prefetcher(cache, transfer, policy, predictor, most_in_flight=most)
    collection_file = None
    if isinstance(policy, TracePolicy):
        collection_file = _collection_file(options, store, policy, layers)
    runtime = OffloadRuntime(
        cache=cache,
        pool=pool,
        transfer=transfer,
        policy=policy,
        prefetcher=prefetcher,
        draft_policy=draft_policy,
        num_draft_layers=len(draft_layers),
        collection_file=collection_file,
        recorder=recording.recorder(options, store.identity.rank, shape, layers),
        published=_counter_file(
            vllm_config,
            options,
            store.identity.rank,
            Way.HOST,
            reads_ahead=prefetcher is not None,
        ),
    )
    all_layers = [*layers, *draft_layers]
    for index, layer in enumerate(all_layers):
        _attach(layer, index, runtime)
    memory.attach(all_layers, runtime)
    if shape.holds_everything:
        runtime.load_everything()
    return runtime


def _attach(layer: Any, index: int, runtime: OffloadRuntime) -> None:
    """Makes a layer's parameters slots of the pool.

    ``.data`` is swapped and the Parameter kept: quantisation configs and kernels hold on
    to biases and scales. With a slot for every expert the layer sees its own, in logical
    order, so that the kernel runs on exactly the tensors that plain vLLM has.
    """
    for name, tensor in runtime.pool.tensors.items():
        parameter = getattr(layer, name)
        if runtime.cache.shape.holds_everything:
            begin = index * layer.local_num_experts
            parameter.data = tensor[begin : begin + layer.local_num_experts]
        else:
            parameter.data = tensor
    layer.moe_layer = index
    layer.runtime = runtime


def _pool_slots(
    memory: FastMemory, options: OffloadConfig, store: ExpertStore, layer: Any
) -> int:
    expert_bytes = store.layout.expert_bytes
    auto_bytes = 0
    if parse_cache_size(options.cache_gb)[0] == "auto":
        auto_bytes = auto_cache_bytes(
            store.num_layers * store.num_experts * expert_bytes,
            memory.available_bytes(layer),
            memory.kv_cache_bytes,
        )
    return cache_slots(
        options.cache_gb,
        expert_bytes=expert_bytes,
        num_layers=store.num_layers,
        num_experts=store.num_experts,
        top_k=layer.top_k,
        auto_bytes=auto_bytes,
    )


def _log_plan(options: OffloadConfig, store: ExpertStore, num_draft_layers: int) -> None:
    total = store.num_layers * store.num_experts
    expert_bytes = store.layout.expert_bytes
    logger.info(
        "MoE offload (%s): %d layers%s x %d experts of %.2f MB = %s in %s",
        options.mode,
        store.num_layers,
        f" ({num_draft_layers} of them the drafter's)" if num_draft_layers else "",
        store.num_experts,
        expert_bytes / 1e6,
        amount(total * expert_bytes),
        " and ".join(map(str, store.paths)),
    )


def sizing_line(
    cache_gb: float | str, shape: CacheShape, expert_bytes: int, way: Way, why: str = ""
) -> str:
    """What was chosen, who plans, and the option that would change it.

    Args:
        cache_gb: the option as it was given.
        shape: what it came to.
        expert_bytes: of one expert.
        way: who plans.
        why: the reason for it; empty where there is no other way.
    """
    total = shape.num_layers * shape.num_experts
    cached = f"cache_gb={cache_gb} -> {amount(shape.num_pool_slots * expert_bytes)}"
    if shape.holds_everything:
        line = f"all experts fit: {cached}, a slot for each of {total}"
        return line if way is Way.HOST else f"{line}; layer calls are vLLM's own"
    # Rounded up, or the last expert would not fit.
    all_gib = math.ceil(total * expert_bytes / GIB * 1000) / 1000
    staging = ""
    if shape.num_staging_slots or way is Way.HOST:
        staging = f" + {shape.num_staging_slots} staging slots"
    planner = ""
    if way is Way.DEVICE:
        planner = "; the GPU plans, by the rule of lrfu, inside vLLM's own CUDA graphs"
    elif why:
        planner = f"; the host plans, without CUDA graphs: {why}"
    return (
        f"{cached}: {shape.num_slots} cache slots ({shape.num_slots / total:.0%} of all experts)"
        f"{staging}; all of them: --moe-offload-config.cache_gb {all_gib:g}{planner}"
    )


def _predictor(
    options: OffloadConfig, shape: CacheShape, routers: Routers | None, top_k: int
) -> Predictor | None:
    """The model's routers, asked early."""
    if options.mode != "trace" or not options.prefetch or shape.holds_everything:
        return None
    if routers is None:
        logger.warning(
            "MoE offload: no router was found beside the experts of every layer, so nothing is "
            "read ahead: each layer waits for what it misses"
        )
        return None
    return RouterLookahead(routers, top_k, LAYERS_AHEAD)


def _collection_file(
    options: OffloadConfig, store: ExpertStore, policy: TracePolicy, layers: list[Any]
) -> CollectionFile | None:
    """Loads the policy's collection, of the experts that this worker has; None if none is kept."""
    if options.trace_path == KEEP_NOTHING:
        return None
    path = store.directory.parent / COLLECTION_NAME
    if options.trace_path is not None:
        path = Path(options.trace_path)
    identity = store.identity
    policy.forecast.collection.fingerprint = identity.checkpoint
    if not identity.rank.sees_all:
        # Another partition may have as many layers and experts in this part, and others.
        policy.forecast.collection.fingerprint += (
            f" {identity.rank.name} {decoder_layers(layers)} {own_experts(layers)}"
        )
    first_slice = first_slice_here(identity.rank)
    file = CollectionFile(
        identity.rank.trace_file(path, first_slice=first_slice),
        policy.forecast.collection,
        writes=identity.rank.tp == first_slice,
    )
    policy.forecast.collection = file.load()
    return file


def _counter_file(
    vllm_config: Any, options: OffloadConfig, rank: Rank, way: Way, *, reads_ahead: bool
) -> Counters:
    served = vllm_config.model_config.served_model_name
    labels = {
        "model_name": served if isinstance(served, str) else served[0],
        "engine": str(vllm_config.parallel_config.data_parallel_index),
        "rank": str(vllm_config.parallel_config.rank),
    }
    info = {
        "policy": options.mode,
        "prefetch": "on" if reads_ahead else "off",
        "version": __version__,
        "part": rank.name,
        "way": way.name.lower(),
    }
    worker = f"pid {os.getpid()}, host {socket.gethostname()}"
    directory = counters_dir()
    if directory is None:  # on another host: the engine core asks for them
        return Counters(labels, info, worker)
    name = f"{rank.name}-{os.getpid()}-{id(rank)}{SUFFIX}"
    return CounterFile(directory / name, labels, info, worker)
