"""Counters of workers that cannot write into the engine core's directory: it asks for them.

A worker on another host, whether Ray or vLLM's own multi-node start put it there, has no such
directory. When the engine core is up it asks all workers once for a description. Those whose
files lie in its directory are never asked again. For each of the others it makes a file there
and writes what the worker answers: API servers, the stats line and the summary at exit read
files, and need not know where a worker is.

Answers of an executor come in the order of the questions, each worker's through one queue that
the model's outputs use as well. That decides how workers are asked:

* by the thread that steps the engine, and only by it;
* without waiting, after a step, once a second, never a second time before the first answer is
  there. Whoever waits for a later step's output is given the answers before it, too;
* when the last request has ended, once more, so that its last steps count. The question goes
  out before the answers to the client do; it is waited for after them, when there is nothing
  else to do. Readers wait for it, too (:data:`vllm_moe_offload.metrics.SETTLE_SECONDS`);
* with the time limit of vLLM's own steps, no other. An answer that comes after its limit would be
  taken for that to the next question, so a limit that passes has to end the engine, as it does
  for a step. No limit at all would take vLLM's away from it: a step that waits for a hanging worker
  waits for the question before it.

An exception in an answer ends the engine for the same reason: answers of the other workers to
the same question are still in their queues.

That a worker's answers do not come is seen by their age, which is counted from the moment of
asking while the engine has requests, not by a limit here.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

from vllm_moe_offload.integration import ended_ranks, failures
from vllm_moe_offload.integration.counters_dir import counters_dir
from vllm_moe_offload.integration.patching import wrap
from vllm_moe_offload.integration.requests import runtime_of
from vllm_moe_offload.integration.shared_memory import boot_id
from vllm_moe_offload.metrics import SUFFIX, CounterFile, Counters, name_of

logger = logging.getLogger("vllm.moe_offload")

POLL_SECONDS = 1.0
"""How often workers are asked while there is work."""

_engines = itertools.count()


# ---- in a worker -------------------------------------------------------------------------


# WorkerBase.moe_offload_description, .moe_offload_counters (v1/worker/worker_base.py)
#   why: counters of a worker on another host are asked for by vLLM's own messages, which call
#     methods of the worker.
#   upstream: Executor.collective_rpc calls any method by its name; workers tell no metrics.
#   remove when: workers can add to what vLLM counts.
def install_in_worker() -> None:
    """Adds what the engine core asks for to vLLM's workers."""
    from vllm.v1.worker.worker_base import WorkerBase

    WorkerBase.moe_offload_description = moe_offload_description
    WorkerBase.moe_offload_counters = moe_offload_counters


def moe_offload_description(worker: Any) -> dict[str, Any] | None:
    """What counts in this worker, and where that is written; None without offloaded layers."""
    counters = _counters_of(worker)
    if counters is None:
        return None
    return {
        "labels": counters.labels,
        "info": counters.info,
        "worker": counters.worker,
        "file": counters.path.name if counters.path is not None else None,
        "boot": boot_id(),
        "values": counters.values,
    }


def moe_offload_counters(worker: Any) -> tuple[float, ...] | None:
    """Values of the end of the last step; None without offloaded layers."""
    counters = _counters_of(worker)
    return None if counters is None else counters.values


def _counters_of(worker: Any) -> Counters | None:
    runtime = runtime_of(worker.model_runner)
    return None if runtime is None else runtime.published


# ---- in the engine core ------------------------------------------------------------------


# EngineCore.step, .step_with_batch_queue, .post_step (v1/engine/core.py)
#   why: workers on other hosts are asked for their counters between steps, by the thread that
#     steps; installed only where there are such workers.
#   upstream: SchedulerStats travel with every step's output and come from the scheduler alone.
#   remove when: workers can add to what vLLM counts.
def begin(engine_core: Any) -> None:
    """Asks all workers of an engine that is up who they are, and those elsewhere from now on."""
    executor = engine_core.model_executor
    descriptions = executor.collective_rpc("moe_offload_description")
    ended_ranks.remember(
        executor,
        engine_core,
        {
            index: name_of(one["labels"], one["worker"])
            for index, one in enumerate(descriptions)
            if one is not None
        },
    )
    directory = counters_dir()
    files = {} if directory is None else files_of_remote(directory, descriptions)
    if not files:
        return
    logger.info(
        "MoE offload: %s cannot write into this server's directory; counters are asked for "
        "every %g s",
        ", ".join(name_of(file.labels, file.worker) for file in files.values()),
        POLL_SECONDS,
    )
    engine_core.moe_offload_remote = RemoteCounters(_questions(executor), files)
    ended_ranks.call_at_end(executor, engine_core.moe_offload_remote.end)
    wrap(type(engine_core), "step", _step)
    wrap(type(engine_core), "step_with_batch_queue", _step)
    wrap(type(engine_core), "post_step", _post_step)


def _questions(executor: Any) -> Callable[[], Future[Any]]:
    from vllm import envs

    def ask() -> Future[Any]:
        return cast(
            "Future[Any]",
            executor.collective_rpc(
                "moe_offload_counters",
                timeout=envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS,
                non_block=True,
            ),
        )

    return ask


def files_of_remote(
    directory: Path, descriptions: Iterable[Mapping[str, Any] | None]
) -> dict[int, CounterFile]:
    """A file in ``directory`` for each worker that has none there, by its place among all.

    Raises:
        OSError: a file cannot be created.
    """
    engine = next(_engines)
    files = {}
    for index, one in enumerate(descriptions):
        if one is None or _is_local(directory, one):
            continue
        path = directory / f"remote{index}-{os.getpid()}-{engine}{SUFFIX}"
        files[index] = CounterFile(path, one["labels"], one["info"], one["worker"])
        files[index].write(one["values"])
    return files


def _is_local(directory: Path, description: Mapping[str, Any]) -> bool:
    """Whether the worker's own file lies in ``directory``, and what it writes is seen here."""
    name = description["file"]
    if name is None or not (directory / name).exists():
        return False
    if description["boot"] == boot_id():
        return True
    # A file system that two hosts share: what one maps and writes, the other may not see, and
    # counts twice once it has a file of its own for the same worker.
    (directory / name).unlink()
    return False


def _step(original: Any, self: Any) -> Any:
    """EngineCore.step and .step_with_batch_queue."""
    remote: RemoteCounters | None = getattr(self, "moe_offload_remote", None)
    if remote is None:
        return original(self)
    remote.before_step(has_requests=self.scheduler.has_unfinished_requests())
    try:
        # A worker elsewhere cannot leave its reason where the front end looks: it is in the answer.
        result = failures.while_serving(original, self)
    except Exception:
        ended_ranks.name_ended(self.model_executor)
        raise
    remote.after_step(has_requests=self.scheduler.has_unfinished_requests())
    return result


def _post_step(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """EngineCore.post_step: called after a step's outputs are on their way to the front end."""
    result = original(self, *args, **kwargs)
    remote: RemoteCounters | None = getattr(self, "moe_offload_remote", None)
    if remote is not None:
        remote.settle()
    return result


class RemoteCounters:
    """Keeps the files of workers that are elsewhere up to date."""

    def __init__(
        self,
        ask: Callable[[], Future[Any]],
        files: Mapping[int, CounterFile],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begins with files that are up to date and an engine without requests.

        Args:
            ask: sends the question to all workers; the future has the values of each, or None.
            files: of workers elsewhere, by their place among the answers.
            clock: seconds; that of readers.
        """
        self._ask_workers = ask
        self._files = dict(files)
        self._clock = clock
        self._answer: Future[Any] | None = None
        self._asked_at = 0.0
        self._asked_for_last = False
        self._is_current = True
        self._stale_since = 0.0
        self._settling_since = 0.0
        # The executor's monitor ends files in its own thread.
        self._lock = threading.Lock()

    def before_step(self, *, has_requests: bool) -> None:
        """From here on workers may count more than the files say."""
        if has_requests and self._is_current:
            self._is_current = False
            self._stale_since = self._clock()
            self._rewrite()

    def after_step(self, *, has_requests: bool) -> None:
        """Takes an answer that has come, and asks if it is time to.

        Raises:
            Exception: an answer that is one, or an executor that has ended.
        """
        if self._answer is not None and self._answer.done():
            self._take_answer()
        if has_requests:
            if self._answer is None and self._clock() - self._asked_at >= POLL_SECONDS:
                self._ask()
        elif not self._is_current and not self._settling_since:
            self._settling_since = self._clock()
            self._rewrite()
            if self._answer is None:
                self._ask()

    def settle(self) -> None:
        """If the last request has ended, waits for what the workers have counted in all.

        They have nothing else to do, so that takes the time of a message and of what was
        scheduled in vain. A signal to shut down does not interrupt it and need not: workers
        answer until the engine core, which waits here, ends them. A worker that was killed ends
        the waiting through the executor's monitor, or, on another host, as late as a step
        that waits for it: by the step's time limit.

        Raises:
            Exception: as :meth:`after_step`.
        """
        while self._settling_since and not self._is_current:
            if self._answer is None:
                self._ask()
            self._take_answer()

    def end(self, indices: Iterable[int]) -> None:
        """These workers have ended: nobody stands behind their counters any more."""
        with self._lock:
            for index in set(indices) & self._files.keys():
                self._files.pop(index).close()

    def _ask(self) -> None:
        self._asked_at = self._clock()
        self._asked_for_last = bool(self._settling_since)
        self._answer = self._ask_workers()

    def _take_answer(self) -> None:
        answer, self._answer = self._answer, None
        assert answer is not None
        values = answer.result()
        self._is_current = self._asked_for_last
        self._stale_since = 0.0 if self._is_current else self._asked_at
        if self._is_current:
            self._settling_since = 0.0
        with self._lock:
            for index, file in self._files.items():
                file.write(values[index], self._stale_since, self._settling_since)

    def _rewrite(self) -> None:
        """The values that are known, with other times."""
        with self._lock:
            for file in self._files.values():
                file.write(file.values, self._stale_since, self._settling_since)
