"""Where requests end, as the scheduler tells workers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from vllm_moe_offload.integration import requests, verified


class Scheduler:
    """As much of vLLM's as is wrapped."""

    def __init__(self) -> None:
        self.finished: list[str] = []

    def free(self, request: Any, delay_free_blocks: bool = False) -> str:
        self.finished.append(request.request_id)
        return f"freed {delay_free_blocks}"

    def update(self, output: Any) -> None:
        self.finished = []


def finish(scheduler: Scheduler, name: str, num_tokens: int) -> Any:
    request = SimpleNamespace(request_id=name, num_tokens=num_tokens)
    return verified._free_request(Scheduler.free, scheduler, request, delay_free_blocks=True)


def schedule(scheduler: Scheduler, **running: int) -> Any:
    output = SimpleNamespace(
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(running), num_computed_tokens=list(running.values())
        )
    )
    verified._update_after_schedule(Scheduler.update, scheduler, output)
    return output


def test_requests_end_before_their_last_token_which_is_never_computed() -> None:
    scheduler = Scheduler()
    assert finish(scheduler, "a", 12) == "freed True"
    output = schedule(scheduler, b=7)
    assert verified.ends_of(output) == {"a": 11, "b": 7}


def test_every_end_is_told_once() -> None:
    scheduler = Scheduler()
    finish(scheduler, "a", 12)
    schedule(scheduler)
    finish(scheduler, "b", 5)
    assert verified.ends_of(schedule(scheduler)) == {"b": 4}
    assert verified.ends_of(schedule(scheduler, c=3)) == {"c": 3}


def test_a_scheduler_that_tells_nothing_is_one_of_the_users_own() -> None:
    output = schedule(Scheduler(), a=4)
    del output.moe_offload_ends
    assert verified.ends_of(output) == {"a": 4}


def test_guesses_are_counted_by_request() -> None:
    output = SimpleNamespace(scheduled_spec_decode_tokens={"b": [5, 6, 7], "c": [1]})
    drafted = requests._num_drafted(output, ["a", "b", "c"])
    assert drafted is not None
    assert drafted.tolist() == [0, 3, 1]
    assert drafted.dtype == np.int32
    output.scheduled_spec_decode_tokens = {}
    assert requests._num_drafted(output, ["a"]) is None
