"""Where stock vLLM's model and runner are changed, with why, upstream reference, when to remove.

``docs/patches.md`` is made from these blocks and those of the same form beside the other patches
(``arguments.py``, ``endpoint.py``, ``loading.py``).

Patches check what they patch and fail loudly on a vLLM they do not know (``patching.py``). Nothing
here runs unless the plugin is installed; what changes the model or the runner is installed in workers
only, and only if ``--moe-offload`` is on.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm_moe_offload.integration import failures
from vllm_moe_offload.integration.patching import require, wrap


# --------------------------------------------------------------------------------------
# WorkerBase.__init__ (v1/worker/worker_base.py)
#   why: the first place in a worker that knows the configuration and runs before the model
#     is built; the patches below must not touch processes or servers without offload.
#   upstream: no plugin hook receives the VllmConfig in a worker.
#   remove when: general plugins are told the configuration.
def install_worker_hook() -> None:
    """Installs the model and runner patches when a worker with offload is created."""
    from vllm.v1.worker.worker_base import WorkerBase

    wrap(WorkerBase, "__init__", _worker_init)


def _worker_init(original: Any, self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    from vllm.platforms import current_platform

    from vllm_moe_offload.integration import (
        cpu_kernels,
        draft_passes,
        host_share,
        lora_adapters,
        ray_shutdown,
        remote_counters,
        shared_memory,
    )
    from vllm_moe_offload.integration.arguments import options_of

    options = options_of(vllm_config)
    if options.enabled:
        if options.cpu_kernels == "avx512":
            cpu_kernels.install()
        if current_platform.is_cpu() and vllm_config.parallel_config.world_size > 1:
            shared_memory.install()
        if vllm_config.parallel_config.use_ray:
            ray_shutdown.install_in_worker()
        if current_platform.is_cpu() and vllm_config.parallel_config.use_ray:
            host_share.fit(
                vllm_config, len(vllm_config.parallel_config.assigned_physical_gpu_ids)
            )
        install_model_patches()
        install_runner_patches()
        if vllm_config.speculative_config is not None:
            draft_passes.install()
        if vllm_config.lora_config is not None:
            lora_adapters.install_in_worker()
        remote_counters.install_in_worker()
        wrap(type(self), "init_device", failures.in_child)
        wrap(type(self), "load_model", failures.in_child)
    original(self, vllm_config, *args, **kwargs)


# --------------------------------------------------------------------------------------
# Executor.__init__ (v1/executor/abstract.py),
# EngineCore._initialize_kv_caches (v1/engine/core.py),
# worker_base.resolve_obj_by_qualname (v1/worker/worker_base.py),
# WorkerBase.init_device, .load_model (v1/worker/worker_base.py)
#   why: what fails in an engine core or a worker is logged there with a traceback, and the
#     front end only learns that something failed.
#   upstream: v1/engine/core.py, EngineCoreProc.run_engine_core; WorkerProc.worker_main of
#     v1/executor/multiproc_executor.py.
#   remove when: a child's exception reaches the front end.
# utils.wait_for_engine_startup (v1/engine/utils.py)
#   why: the place in the front end, of servers and of LLM alike, that learns that an engine failed.
#   upstream: v1/engine/utils.py ("See root cause above").
#   remove when: a child's exception reaches the front end.
# FlexibleArgumentParser.parse_args (utils/argparse_utils.py)
#   why: a wrong option, found after parsing, ends the command with a traceback and status 1.
#   upstream: entrypoints/cli/main.py calls what the parser put in ``dispatch_function``.
#   remove when: the command line prints ValueErrors of the configuration as argparse does.
def install_failure_hooks() -> None:
    """Lets the reason of a failed start be the last line, and options end with status 2."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine import utils
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.worker import worker_base

    wrap(FlexibleArgumentParser, "parse_args", failures.parse_args)
    wrap(utils, "wait_for_engine_startup", failures.in_front_end)
    wrap(Executor, "__init__", _executor_init)
    wrap(worker_base, "resolve_obj_by_qualname", _resolve_worker)


def _resolve_worker(original: Any, name: str) -> Any:
    """A worker's class just before it is made: the platform's own, which is not known earlier."""
    from vllm.v1.worker.worker_base import WorkerBase

    found = original(name)
    if isinstance(found, type) and issubclass(found, WorkerBase):
        wrap(found, "__init__", _whole_worker_init)
    return found


def _whole_worker_init(
    original: Any, self: Any, vllm_config: Any, *args: Any, **kwargs: Any
) -> None:
    from vllm_moe_offload.integration.arguments import options_of

    if options_of(vllm_config).enabled:
        failures.in_child(original, self, vllm_config, *args, **kwargs)
    else:
        original(self, vllm_config, *args, **kwargs)


def _executor_init(original: Any, self: Any, vllm_config: Any) -> None:
    from vllm_moe_offload.integration.arguments import options_of

    if not options_of(vllm_config).enabled:
        original(self, vllm_config)
        return
    from vllm.v1.engine.core import EngineCore

    from vllm_moe_offload.integration import ended_ranks, verified

    wrap(EngineCore, "_initialize_kv_caches", _initialize_kv_caches)
    if vllm_config.speculative_config is not None:
        verified.install()
    ended_ranks.install(type(self))
    if vllm_config.parallel_config.use_ray:
        from vllm_moe_offload.integration import ray_nodes

        original = functools.partial(ray_nodes.start, original)
    failures.in_child(original, self, vllm_config)


def _initialize_kv_caches(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """The last part of an engine core's start that needs workers."""
    return failures.in_child(_start_workers, original, self, *args, **kwargs)


def _start_workers(original: Any, engine_core: Any, *args: Any, **kwargs: Any) -> Any:
    from vllm_moe_offload.integration import remote_counters
    from vllm_moe_offload.integration.arguments import options_of

    result = original(engine_core, *args, **kwargs)
    if options_of(engine_core.vllm_config).enabled:
        remote_counters.begin(engine_core)
    return result


# --------------------------------------------------------------------------------------
# RoutedExperts.__new__ (model_executor/layers/fused_moe/routed_experts.py)
#   why: PluggableLayer.register_oot replaces a class by its name and misses subclasses
#     (GptOssRoutedExperts and others would silently run without offload); `__new__` on the
#     base covers every subclass, and asks the configuration, so that `off` and a second
#     model in the same process keep vLLM's classes.
#   upstream: model_executor/custom_op.py, `PluggableLayer.__new__`.
#   remove when: register_oot covers subclasses and can be scoped to a configuration.
# DefaultModelLoader.get_all_weights (model_executor/model_loader/default_loader.py),
# DummyModelLoader.load_weights (model_executor/model_loader/dummy_loader.py)
#   why: experts must be taken out of memory layer by layer while the checkpoint streams.
#   upstream: no hook between the loader's stream and the model.
#   remove when: vLLM can load a model without ever holding it.
def install_model_patches() -> None:
    """Swaps the expert layers and hooks into the loaders."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
    from vllm.platforms import current_platform

    from vllm_moe_offload.integration import experts, loading

    require(RoutedExperts, "forward_modular")  # which OffloadedRoutedExperts overrides
    if "__new__" not in RoutedExperts.__dict__:
        inherited = RoutedExperts.__new__

        def new(cls: Any, *args: Any, **kwargs: Any) -> Any:
            return experts.instantiate(inherited, cls, *args, **kwargs)

        RoutedExperts.__new__ = new
    wrap(DefaultModelLoader, "get_all_weights", loading.stream_weights)
    wrap(DummyModelLoader, "load_weights", loading.load_dummy_weights)
    if current_platform.is_cuda():
        install_cuda_patches()


# --------------------------------------------------------------------------------------
# triton_moe._prepare_expert_assignment
# (model_executor/layers/fused_moe/experts/triton_moe.py)
#   why: blocks of tokens must be formed from logical ids and their experts renamed to slots
#     of the pool afterwards; expert_map would be counted in an array for E experts.
#   upstream: csrc/moe/moe_align_sum_kernels.cu (expert_map); fused_moe.py.
#   remove when: FusedMoE takes a map from block experts to rows of the weights.
# Worker.determine_available_memory, .compile_or_warm_up_model (v1/worker/gpu_worker.py)
#   why: the V2 runner's captures call the model beside _dummy_run, and its warm-up goes
#     through execute_model with made-up requests: experts would be read for them, and traced. Where
#     the device plans, calls begin to move its cache when the second of them has returned.
#   upstream: v1/worker/gpu/cudagraph_utils.py, v1/worker/gpu/warmup.py.
#   remove when: warm-up steps are marked as such.
def install_cuda_patches() -> None:
    """What serving from GPU memory changes beyond :func:`install_model_patches`."""
    from vllm.model_executor.layers.fused_moe.experts import triton_moe
    from vllm.v1.worker.gpu_worker import Worker

    from vllm_moe_offload.integration import marlin_slots, requests, triton_slots

    wrap(triton_moe, "_prepare_expert_assignment", triton_slots.prepare_expert_assignment)
    marlin_slots.install()
    wrap(Worker, "determine_available_memory", requests.warm_up)
    wrap(Worker, "compile_or_warm_up_model", requests.last_warm_up)


# --------------------------------------------------------------------------------------
# Both runners: V1 (v1/worker/gpu_model_runner.py) and V2 (v1/worker/gpu/model_runner.py).
#
# GPUModelRunner._prepare_inputs (v1/worker/gpu_model_runner.py),
# GPUModelRunner.prepare_inputs (v1/worker/gpu/model_runner.py)
#   why: the tokens of a forward pass have to be told apart by request; only the runner knows.
#   upstream: --enable-return-routed-experts captures routing per request (V2 only), after
#     the fact, without positions of the running batch.
#   remove when: ForwardContext carries the request of every row.
# GPUModelRunner.execute_model (v1/worker/gpu_model_runner.py, v1/worker/gpu/model_runner.py)
#   why: the scheduler's output names the requests that ended; what they used is learned from
#     and their own history is dropped. Where the device plans, the step's routing is copied behind
#     the forward pass, before the next one writes over it.
#   upstream: no hook for the end of a request in a worker.
#   remove when: workers are told of the end of a request.
# GPUModelRunner.sample_tokens (v1/worker/gpu_model_runner.py, v1/worker/gpu/model_runner.py)
#   why: what a drafter cannot read ends the engine as what the model cannot read does: with the
#     reason as the last line.
#   upstream: see Executor.__init__.
#   remove when: a child's exception reaches the front end.
# GPUModelRunner._dummy_run (v1/worker/gpu_model_runner.py, v1/worker/gpu/model_runner.py)
#   why: profiling, warm-up and capture run the model without requests; experts would be read
#     for them, and traced.
#   upstream: ForwardContext does not say that a run is a dummy.
#   remove when: it does.
# GPUModelRunner.shutdown (v1/worker/gpu_model_runner.py, v1/worker/gpu/model_runner.py)
#   why: store and readers are closed, the recorded trace and the collection are written.
#   upstream: no hook for plugins at the end of a worker.
#   remove when: there is one.
# GPUModelRunner.reload_weights (v1/worker/gpu_model_runner.py, v1/worker/gpu/model_runner.py)
#   why: new weights would be written into slots that hold other experts; it is refused.
#   upstream: no model can say that it does not reload.
#   remove when: the store can be built anew while serving.
def install_runner_patches() -> None:
    """Tells the runtime which request each row belongs to, and which runs are dummies."""
    import vllm.v1.worker.gpu.model_runner as v2
    import vllm.v1.worker.gpu_model_runner as v1

    from vllm_moe_offload.integration import requests

    wrap(v1.GPUModelRunner, "_prepare_inputs", requests.v1_prepare_inputs)
    wrap(v2.GPUModelRunner, "prepare_inputs", requests.v2_prepare_inputs)
    for runner in (v1.GPUModelRunner, v2.GPUModelRunner):
        wrap(runner, "execute_model", requests.execute_model)
        wrap(runner, "sample_tokens", requests.sample_tokens)
        wrap(runner, "_dummy_run", requests.dummy_run)
        wrap(runner, "shutdown", requests.shutdown)
        wrap(runner, "reload_weights", requests.refuse_reload)
