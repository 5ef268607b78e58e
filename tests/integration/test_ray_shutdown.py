"""Workers on Ray write what they keep before they are killed, if the engine is well."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_moe_offload.integration import ray_shutdown, requests


class Executor:
    """One on Ray; it notes what it asks its workers."""

    def __init__(self, *, failed: bool = False, error: Exception | None = None) -> None:
        self.is_failed = failed
        self.ray_worker_handles: list[object] = []
        self.futures_queue: list[object] = []
        self.asked: list[tuple[str, float]] = []
        self._error = error

    def collective_rpc(self, method: str, timeout: float) -> None:
        """What vLLM's sends to all workers."""
        self.asked.append((method, timeout))
        if self._error is not None:
            raise self._error


def test_workers_of_an_engine_that_is_well_are_closed():
    executor = Executor()
    ray_shutdown.close_workers(executor)
    assert executor.asked == [("moe_offload_close", ray_shutdown.CLOSE_SECONDS)]


@pytest.mark.parametrize("missing", ["ray_worker_handles", "futures_queue", None])
def test_others_are_left_alone(missing):
    """vLLM's own processes shut down themselves; a failed engine, or half of one, cannot answer."""
    executor = Executor(failed=missing is None)
    if missing is not None:
        delattr(executor, missing)
    ray_shutdown.close_workers(executor)
    assert executor.asked == []


@pytest.mark.parametrize("error", [TimeoutError("60 s"), RuntimeError("Worker failed")])
def test_what_may_be_missing_is_said(error, caplog):
    ray_shutdown.close_workers(Executor(error=error))
    assert f"workers on Ray did not close ({error})" in caplog.text


def test_a_worker_ends_its_runtime(monkeypatch):
    closed = []
    runtime = SimpleNamespace(close=lambda: closed.append(True))
    monkeypatch.setattr(requests, "runtime_of", lambda runner: runner)
    ray_shutdown.moe_offload_close(SimpleNamespace(model_runner=runtime))
    ray_shutdown.moe_offload_close(SimpleNamespace(model_runner=None))  # dense layers alone
    assert closed == [True]


def test_files_that_cannot_be_written_are_named_and_the_end_goes_on(monkeypatch, caplog):
    """One line for each; vLLM's own shutdown follows."""

    def close() -> None:
        errors = [OSError("no room for the trace"), OSError("no room for the counters")]
        raise ExceptionGroup("the expert cache did not close", errors)

    monkeypatch.setattr(requests, "runtime_of", lambda runner: runner)
    result = requests.shutdown(lambda runner: "shut down", SimpleNamespace(close=close))
    assert result == "shut down"
    assert [record.getMessage() for record in caplog.records] == [
        "MoE offload: not all was written at the end: no room for the trace",
        "MoE offload: not all was written at the end: no room for the counters",
    ]


def test_errors_that_are_no_files_are_raised(monkeypatch):
    def close() -> None:
        raise ExceptionGroup("the expert cache did not close", [KeyError("a")])

    monkeypatch.setattr(requests, "runtime_of", lambda runner: runner)
    with pytest.raises(ExceptionGroup):
        requests.close_runtime(SimpleNamespace(close=close))
