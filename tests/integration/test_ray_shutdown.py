"""Workers on Ray write what they keep before they are killed, if the engine is well."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_moe_offload.integration import ray_shutdown


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
    monkeypatch.setattr(ray_shutdown, "runtime_of", lambda runner: runner)
    ray_shutdown.moe_offload_close(SimpleNamespace(model_runner=runtime))
    ray_shutdown.moe_offload_close(SimpleNamespace(model_runner=None))  # dense layers alone
    assert closed == [True]
