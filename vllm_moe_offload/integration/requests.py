"""Which tokens of a forward pass belong to which request: vLLM's runners, V1 and V2.

The wrappers below translate a runner's batch into :class:`StepTokens` and hand it to the
worker's runtime. A runner whose model has no offloaded layer passes straight through.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.integration import failures, verified
from vllm_moe_offload.integration.experts import Runtime, find_runtime
from vllm_moe_offload.step import StepTokens

logger = logging.getLogger("vllm.moe_offload")

_UNKNOWN = object()


def runtime_of(runner: Any) -> Runtime | None:
    """The runtime behind a model runner's model, remembered on the runner."""
    runtime = getattr(runner, "_moe_offload_runtime", _UNKNOWN)
    if runtime is _UNKNOWN:
        if getattr(runner, "model", None) is None:
            return None  # not loaded yet
        runtime = find_runtime(runner.get_model())
        runner._moe_offload_runtime = runtime
    return cast(Runtime | None, runtime)


def v1_prepare_inputs(
    original: Any, self: Any, scheduler_output: Any, num_scheduled_tokens: Any, *args: Any
) -> Any:
    """V1: the order of ``input_batch`` is final when the inputs are prepared."""
    runtime = runtime_of(self)
    if runtime is not None:
        batch = self.input_batch
        count = batch.num_reqs
        requests = list(batch.req_ids[:count])
        computed = batch.num_computed_tokens_cpu[:count]
        runtime.begin_step(
            StepTokens.of_lengths(
                requests,
                num_scheduled_tokens[:count],
                computed,
                computed < batch.num_prompt_tokens[:count],
                _num_drafted(scheduler_output, requests),
            )
        )
    return original(self, scheduler_output, num_scheduled_tokens, *args)


def v2_prepare_inputs(
    original: Any, self: Any, scheduler_output: Any, *args: Any, **kwargs: Any
) -> Any:
    """V2: the prepared batch itself names its requests."""
    batch = original(self, scheduler_output, *args, **kwargs)
    runtime = runtime_of(self)
    if runtime is not None:
        count = batch.num_reqs
        requests = list(batch.req_ids[:count])
        runtime.begin_step(
            StepTokens.of_lengths(
                requests,
                np.asarray(batch.num_scheduled_tokens[:count]),
                np.asarray(batch.num_computed_tokens_np[:count]),
                np.asarray(batch.is_prefilling_np[:count]),
                _num_drafted(scheduler_output, requests),
            )
        )
    return batch


def _num_drafted(scheduler_output: Any, requests: list[str]) -> npt.NDArray[np.int32] | None:
    """Of each request's tokens in the step, those at the end that a drafter guessed."""
    drafted = scheduler_output.scheduled_spec_decode_tokens
    if not drafted:
        return None
    return np.array([len(drafted.get(request, ())) for request in requests], np.int32)


def execute_model(
    original: Any, self: Any, scheduler_output: Any, *args: Any, **kwargs: Any
) -> Any:
    """Ends requests that the scheduler reports as finished, and only those.

    V2 shows a preemption as removal and re-adding; ``finished_req_ids`` never names it.
    """
    runtime = runtime_of(self)
    if runtime is None:
        return original(self, scheduler_output, *args, **kwargs)
    if self.speculative_config is not None:
        runtime.verify(verified.ends_of(scheduler_output))
    for request in scheduler_output.finished_req_ids:
        runtime.end_request(request)
    result = failures.while_serving(original, self, scheduler_output, *args, **kwargs)
    runtime.after_forward()
    return result


def sample_tokens(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Here a drafter runs, which may have experts to read."""
    if runtime_of(self) is None:
        return original(self, *args, **kwargs)
    return failures.while_serving(original, self, *args, **kwargs)


def dummy_run(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Profile, warm-up and capture runs: no request stands behind them."""
    runtime = runtime_of(self)
    if runtime is None:
        return original(self, *args, **kwargs)
    with runtime.dummy_run():
        return original(self, *args, **kwargs)


def warm_up(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """What a GPU worker does between loading and serving: steps that nobody asked for."""
    return dummy_run(lambda _: original(self, *args, **kwargs), self.model_runner)


def last_warm_up(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """:func:`warm_up`; what comes after it is served."""
    result = warm_up(original, self, *args, **kwargs)
    runtime = runtime_of(self.model_runner)
    if runtime is not None:
        runtime.go_live()
    return result


def shutdown(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """The worker goes: close the store, finish the recording, print the summary. vLLM ends its own
    parts whatever comes of that: after an error of a device nothing that asks it works any more."""
    try:
        close_runtime(self)
    finally:
        result = original(self, *args, **kwargs)
    return result


def close_runtime(runner: Any) -> None:
    """Closes the runtime behind a model runner, if there is one. A file that cannot be written is
    an error in the log: the server has served, and goes on ending."""
    runtime = runtime_of(runner)
    if runtime is None:
        return
    try:
        runtime.close()
    except* OSError as group:
        for error in _leaves(group):
            logger.error("MoE offload: not all was written at the end: %s", error)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def refuse_reload(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Reloading would write weights into slots that belong to other experts."""
    if runtime_of(self) is not None:
        raise NotImplementedError(
            "reload_weights is not possible with --moe-offload: experts lie in a store that was "
            "built from the checkpoint at start. Restart the server with the new weights."
        )
    return original(self, *args, **kwargs)
