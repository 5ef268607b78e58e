"""Which of the tokens that a drafter guessed turned out to be their requests'.

The scheduler takes rejected tokens back before it schedules a request again, so where a request
goes on says it; of a request that ended its output does, which may be cut behind a token that ends
it. A worker is told the former by vLLM, and the latter by what is added here to the scheduler's
output.
"""

from __future__ import annotations

from typing import Any

from vllm_moe_offload.integration.patching import wrap


# --------------------------------------------------------------------------------------
# Scheduler._free_request, ._update_after_schedule (v1/core/sched/scheduler.py)
#   why: how long a request was when it ended, which workers are not told: the drafted tokens of
#     its last step are its own up to there.
#   upstream: SchedulerOutput.finished_req_ids names requests and no more.
#   remove when: it says how many of a finished request's tokens were computed for good.
def install() -> None:
    """Has the scheduler say where finished requests end; in the engine core's process."""
    from vllm.v1.core.sched.scheduler import Scheduler

    wrap(Scheduler, "_free_request", _free_request)
    wrap(Scheduler, "_update_after_schedule", _update_after_schedule)


def _free_request(original: Any, self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    ends: dict[str, int] = self.__dict__.setdefault("_moe_offload_ends", {})
    # The last token was sampled and is never computed.
    ends[request.request_id] = request.num_tokens - 1
    return original(self, request, *args, **kwargs)


def _update_after_schedule(original: Any, self: Any, scheduler_output: Any) -> Any:
    scheduler_output.moe_offload_ends = self.__dict__.pop("_moe_offload_ends", {})
    return original(self, scheduler_output)


def ends_of(scheduler_output: Any) -> dict[str, int]:
    """Per request that goes on or ended, the position at which what is verified of it ends.

    Positions are the scheduler's of now only where it waited for the step before (no asynchronous
    scheduling, which :mod:`~vllm_moe_offload.integration.speculation` turns off).
    """
    cached = scheduler_output.scheduled_cached_reqs
    ends = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    # A scheduler of the user's own may say nothing: then of a last step no guess counts.
    ends.update(getattr(scheduler_output, "moe_offload_ends", {}))
    return ends
