"""Puts a worker's runtime together once store and layers are known, and says what fits."""

from __future__ import annotations

import logging
import math
import os
import socket
from pathlib import Path
from typing import Any

from vllm_moe_offload import __version__
from vllm_moe_offload.cache.planner import CacheShape, ExpertCache
from vllm_moe_offload.cache.sizing import auto_cache_bytes, cache_shape, cache_slots
from vllm_moe_offload.config import GIB, KEEP_NOTHING, OffloadConfig, parse_cache_size
from vllm_moe_offload.forecast.lookahead import RouterLookahead, Routers
from vllm_moe_offload.forecast.predictor import Predictor
from vllm_moe_offload.integration import recording
from vllm_moe_offload.integration.counters_dir import counters_dir
from vllm_moe_offload.integration.fast_memory import FastMemory, fast_memory
from vllm_moe_offload.integration.placement import (
    decoder_layers,
    first_slice_here,
    own_experts,
)
from vllm_moe_offload.integration.speculation import passes_per_layer
from vllm_moe_offload.metrics import SUFFIX, CounterFile, Counters
from vllm_moe_offload.plan.fit import amount
from vllm_moe_offload.policy import Policy, TracePolicy
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
) -> OffloadRuntime:
    """Builds pool, cache, transfer and runtime, and points the layers' parameters at the pool.

    Args:
        vllm_config: the worker's.
        options: the plugin's.
        store: of the experts of all layers, the drafter's behind the model's.
        layers: the model's RoutedExperts.
        routers: of these, where they are known, for prediction.
        draft_layers: a drafter's RoutedExperts.
    """
    first = layers[0]
    policy, draft_policy = make_policies(
        options.mode,
        len(layers),
        len(draft_layers),
        first.local_num_experts,
        passes_per_layer(vllm_config),
    )
    memory = fast_memory(vllm_config)
    shape = _shape(memory, options, store, first, policy)
    _log_plan(options, store, shape, len(draft_layers))
    pool, transfer = memory.build(store, shape, options)
    cache = ExpertCache(shape, policy.rules)
    predictor = _predictor(options, shape, routers, first.top_k)
    prefetcher = None
    if predictor is not None:
        most = memory.most_prefetches(store.num_experts)
        prefetcher = Prefetcher(cache, transfer, policy, predictor, most_in_flight=most)
    runtime = OffloadRuntime(
        cache=cache,
        pool=pool,
        transfer=transfer,
        policy=policy,
        prefetcher=prefetcher,
        draft_policy=draft_policy,
        num_draft_layers=len(draft_layers),
        collection_file=_collection_file(options, store, policy, layers),
        recorder=recording.recorder(options, store.identity.rank, shape, layers),
        published=_counter_file(
            vllm_config, options, store.identity.rank, reads_ahead=prefetcher is not None
        ),
    )
    all_layers = [*layers, *draft_layers]
    for index, layer in enumerate(all_layers):
        _attach(layer, index, runtime)
    memory.attach(all_layers, runtime)
    if shape.holds_everything:
        runtime.load_everything()
        memory.settle()
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


def _shape(
    memory: FastMemory,
    options: OffloadConfig,
    store: ExpertStore,
    layer: Any,
    policy: Policy,
) -> CacheShape:
    sizes = {
        "num_layers": store.num_layers,
        "num_experts": store.num_experts,
        "top_k": layer.top_k,
    }
    expert_bytes = store.layout.expert_bytes
    auto_bytes = 0
    if parse_cache_size(options.cache_gb)[0] == "auto":
        auto_bytes = auto_cache_bytes(
            store.num_layers * store.num_experts * expert_bytes,
            memory.available_bytes(layer),
            memory.kv_cache_bytes,
        )
    slots = cache_slots(
        options.cache_gb, expert_bytes=expert_bytes, auto_bytes=auto_bytes, **sizes
    )
    return cache_shape(slots, rules=policy.rules, **sizes)


def _log_plan(
    options: OffloadConfig, store: ExpertStore, shape: CacheShape, num_draft_layers: int
) -> None:
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
    logger.info("MoE offload: %s", sizing_line(options.cache_gb, shape, expert_bytes))


def sizing_line(cache_gb: float | str, shape: CacheShape, expert_bytes: int) -> str:
    """What was chosen, and the option that would change it.

    Args:
        cache_gb: the option as it was given.
        shape: what it came to.
        expert_bytes: of one expert.
    """
    total = shape.num_layers * shape.num_experts
    cached = f"cache_gb={cache_gb} -> {amount(shape.num_pool_slots * expert_bytes)}"
    if shape.holds_everything:
        return f"all experts fit: {cached}, a slot for each of {total}"
    # Rounded up, or the last expert would not fit.
    all_gib = math.ceil(total * expert_bytes / GIB * 1000) / 1000
    return (
        f"{cached}: {shape.num_slots} cache slots ({shape.num_slots / total:.0%} of all experts) "
        f"+ {shape.num_staging_slots} staging slots; all of them: "
        f"--moe-offload-config.cache_gb {all_gib:g}"
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
    options: OffloadConfig, store: ExpertStore, policy: Policy, layers: list[Any]
) -> CollectionFile | None:
    """Loads the policy's collection, of the experts that this worker has; None if none is kept."""
    if not isinstance(policy, TracePolicy) or options.trace_path == KEEP_NOTHING:
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
    vllm_config: Any, options: OffloadConfig, rank: Rank, *, reads_ahead: bool
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
    }
    worker = f"pid {os.getpid()}, host {socket.gethostname()}"
    directory = counters_dir()
    if directory is None:  # on another host: the engine core asks for them
        return Counters(labels, info, worker)
    name = f"{rank.name}-{os.getpid()}-{id(rank)}{SUFFIX}"
    return CounterFile(directory / name, labels, info, worker)
