"""Which rank ended first: a worker that was killed, or crashed, takes the whole engine with it.

vLLM's executor notices that one of its processes is gone, and ends the others; to the front end it
says that the executor failed. When it is about to end them, those that are gone already are the
reason.
"""

from __future__ import annotations

import signal
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.connection import wait
from typing import Any

from vllm_moe_offload.integration import failures, ray_shutdown
from vllm_moe_offload.integration.arguments import options_of
from vllm_moe_offload.integration.patching import wrap

NOTICE_SECONDS = 0.2
"""A step may fail because of a process's end before that shows."""
EXIT_SECONDS = 2.0
"""From a process's end, its files closed, until its exit status is there."""
RAY_NOTICES_SECONDS = 2.0
"""Ray learns of an actor's end from another process: a step may fail because of it before."""


# Executor.shutdown (v1/executor/abstract.py),
# MultiprocExecutor.shutdown (v1/executor/multiproc_executor.py),
# RayExecutorV2.shutdown (v1/executor/ray_executor_v2.py)
#   why: the last moment at which ranks that ended by themselves can be told from those that
#     are ended; whichever thread notices first, it comes here.
#   upstream: MultiprocExecutor.start_worker_monitor logs a process's name and calls back without.
#   remove when: the failure callback is told which rank ended, and the front end with it.
def install(executor_class: type) -> None:
    """Looks for ranks that are gone before an executor of this class ends the others."""
    wrap(executor_class, "shutdown", _shutdown)


def remember(executor: Any, engine_core: Any, names: Mapping[int, str]) -> None:
    """What is known once an engine is up.

    Args:
        executor: of the engine.
        engine_core: it knows whether it was asked to stop.
        names: of ranks, as messages have them, by their place among all.
    """
    executor.moe_offload_engine = weakref.ref(engine_core)
    executor.moe_offload_names = dict(names)


def call_at_end(executor: Any, call: Callable[[Iterable[int]], None]) -> None:
    """Calls ``call`` with the places of ranks that are gone, then with those that are ended."""
    executor.moe_offload_end = call


def _shutdown(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Executor.shutdown; of an engine without offload, vLLM's own."""
    if not options_of(self.vllm_config).enabled:
        return original(self, *args, **kwargs)
    end = getattr(self, "moe_offload_end", None)
    if not getattr(self, "shutting_down", False):
        name_ended(self)
        if not getattr(self, "moe_offload_has_named", False):
            ray_shutdown.close_workers(self)
    result = original(self, *args, **kwargs)
    if end is not None:
        end(range(self.parallel_config.world_size))
    return result


def name_ended(executor: Any) -> None:
    """Leaves for the front end which ranks ended by themselves, if any did; the first time it knows.

    To be called before the front end hears of a failure: it ends the engine core then, at once.
    """
    if getattr(executor, "moe_offload_has_named", False):
        return
    ended = dict(_ended_by_themselves(executor))
    end = getattr(executor, "moe_offload_end", None)
    if end is not None:
        end(ended)
    if ended:
        executor.moe_offload_has_named = True
        names = getattr(executor, "moe_offload_names", {})
        failures.leave_ended_ranks(
            {names.get(index, f"rank {index}"): how for index, how in ended.items()}
        )


def _ended_by_themselves(executor: Any) -> Iterator[tuple[int, str]]:
    """Places of ranks whose processes are gone though nobody asked the engine to stop, and how."""
    is_running = _is_running(executor)
    if is_running is False:
        return
    workers = {
        worker.proc.sentinel: worker for worker in getattr(executor, "workers", None) or []
    }
    for sentinel in wait(list(workers), NOTICE_SECONDS if is_running else 0):
        process = workers[sentinel].proc
        process.join(EXIT_SECONDS)
        # Processes leave with 0 when they are told to end. In the front end's own process
        # nothing says whether that was everyone (Ctrl-C in a terminal).
        if process.exitcode != 0 or is_running:
            yield workers[sentinel].rank, how_it_ended(process.exitcode)
    has_failed = getattr(executor, "is_failed", False) or is_running
    if has_failed and hasattr(executor, "ray_worker_handles"):
        yield from _ended_actors(executor.ray_worker_handles)


def _is_running(executor: Any) -> bool | None:
    """Whether the engine is to go on; None if it does not know, in the front end's process."""
    reference = getattr(executor, "moe_offload_engine", None)
    is_running = getattr(reference and reference(), "is_running", None)
    return None if is_running is None else bool(is_running())


def how_it_ended(status: int | None) -> str:
    """In words, from a process's exit status as ``multiprocessing`` has it."""
    if status is not None and status < 0:
        return f"ended: killed by {signal.Signals(-status).name}"
    return f"ended: exit status {'unknown' if status is None else status}"


def _ended_actors(handles: Iterable[Any]) -> Iterator[tuple[int, str]]:
    import ray

    ranks = {handle.run_ref: handle.rank for handle in handles if handle.run_ref is not None}
    if not ranks or not ray.is_initialized():
        return
    done, running = ray.wait(list(ranks), num_returns=1, timeout=RAY_NOTICES_SECONDS)
    if running:
        done += ray.wait(running, num_returns=len(running), timeout=0)[0]
    for reference in done:
        yield ranks[reference], "ended: Ray's actor is gone"
