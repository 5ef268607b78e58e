"""A rank that ends by itself is named, in the last line and in the summary; others are not."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import urllib.error
from types import SimpleNamespace

import pytest

from tests.counter_workers import INFO, LABELS, values_of
from tests.integration.conftest import ENGINES
from tests.integration.served import PROBE, PROMPTS, complete, post, scrape, serve
from vllm_moe_offload.integration import ended_ranks, endpoint, failures
from vllm_moe_offload.integration.counters_dir import ENVIRONMENT
from vllm_moe_offload.integration.ended_ranks import how_it_ended
from vllm_moe_offload.metrics import CounterFile

NAMES = {0: "rank 0 (pid 10, host a)", 1: "rank 1 (pid 11, host b)"}


@pytest.fixture(autouse=True)
def server_directory(monkeypatch, tmp_path):
    """The directory of a server that is up."""
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    failures.begin()
    return tmp_path


class Process:
    """A worker's process as ``multiprocessing`` shows it: its status is there after its end."""

    def __init__(self, status):
        self.exitcode = None
        self.sentinel, self._its_end = os.pipe()
        self._status = status
        if status is not None:
            self.leave(status)

    def leave(self, status):
        """It ends."""
        self._status = status
        os.close(self._its_end)

    def join(self, timeout):
        """Waits for its status."""
        assert timeout
        self.exitcode = self._status


def executor_of(statuses, *, mode="lrfu", **more):
    """An executor whose processes have these exit statuses (None: they run)."""

    class Executor:
        def shutdown(self):
            self.shutting_down = True
            return "shut down"

    executor = Executor()
    executor.vllm_config = SimpleNamespace(additional_config={"moe_offload": {"mode": mode}})
    executor.parallel_config = SimpleNamespace(world_size=len(statuses))
    executor.workers = [
        SimpleNamespace(rank=rank, proc=Process(status)) for rank, status in enumerate(statuses)
    ]
    vars(executor).update(more)
    ended_ranks.install(Executor)
    return executor


class Engine:
    """An engine core in a process of its own."""

    def __init__(self, *, running=True):
        self.is_running = lambda: running


def test_a_killed_rank_is_the_reason(server_directory):
    executor, engine = executor_of([None, -signal.SIGKILL]), Engine()
    ended_ranks.remember(executor, engine, NAMES)
    told = []
    ended_ranks.call_at_end(executor, lambda ranks: told.append(list(ranks)))
    assert executor.shutdown() == "shut down"
    assert told == [[1], [0, 1]]
    assert failures.known_failure() == failures.Failure(
        "rank 1 (pid 11, host b) ended: killed by SIGKILL", False, (NAMES[1],)
    )
    executor.workers[0].proc.leave(0)  # those that it has ended are no reason
    executor.shutdown()
    assert failures.known_failure().ended_ranks == (NAMES[1],)


def test_a_step_that_failed_names_it_before_the_front_end_hears_and_nobody_again():
    failures.leave_failure(RuntimeError("Connection closed by peer"))
    executor, engine = executor_of([None, -signal.SIGKILL]), Engine()
    ended_ranks.remember(executor, engine, NAMES)
    ended_ranks.name_ended(executor)
    named = failures.known_failure()
    assert named.ended_ranks == (NAMES[1],)
    executor.shutdown()
    assert failures.known_failure() == named


def test_what_other_ranks_left_is_told_behind_it():
    failures.leave_failure(RuntimeError("Connection closed by peer"))
    executor, engine = executor_of([-signal.SIGSEGV, None]), Engine()
    ended_ranks.remember(executor, engine, NAMES)
    executor.shutdown()
    assert failures.known_failure().reason == (
        "rank 0 (pid 10, host a) ended: killed by SIGSEGV; "
        "then: RuntimeError: Connection closed by peer"
    )


@pytest.mark.parametrize("status", [0, -signal.SIGKILL])
def test_an_engine_that_is_asked_to_stop_names_nobody(status):
    """Ctrl-C reaches the workers as well, and they may be the faster ones."""
    executor, engine = executor_of([status, None]), Engine(running=False)
    ended_ranks.remember(executor, engine, NAMES)
    executor.shutdown()
    assert failures.known_failure() is None


@pytest.mark.parametrize(("status", "is_told"), [(0, False), (1, True), (-9, True)])
def test_in_the_front_ends_process_those_that_did_not_leave_quietly_are_named(status, is_told):
    class InProcess:
        """An engine core that is told by nobody that all is over."""

    executor, engine = executor_of([None, status]), InProcess()
    ended_ranks.remember(executor, engine, NAMES)
    executor.shutdown()
    assert (failures.known_failure() is not None) == is_told


def test_before_the_engine_is_up_ranks_have_numbers():
    executor_of([None, -signal.SIGKILL]).shutdown()
    assert failures.known_failure().reason == "rank 1 ended: killed by SIGKILL"


def test_the_reason_why_processes_left_stays_if_it_is_an_option():
    failures.leave_failure(failures.OptionError("cache_gb=1: too small"))
    executor_of([None, 2]).shutdown()
    assert failures.known_failure() == failures.Failure("cache_gb=1: too small", True)


def test_engines_without_offload_are_left_alone():
    executor = executor_of([-9, None], mode="off")
    assert executor.shutdown() == "shut down"
    assert failures.known_failure() is None


def test_actors_of_ray_are_asked_for_what_became_of_them(monkeypatch):
    waits = []

    def wait(references, num_returns, timeout):
        waits.append(timeout)
        done = [it for it in references if it in {"run 1", "run 2"}][:num_returns]
        return done, [it for it in references if it not in done]

    ray = SimpleNamespace(wait=wait, is_initialized=lambda: True)
    monkeypatch.setitem(sys.modules, "ray", ray)
    handles = [SimpleNamespace(rank=rank, run_ref=f"run {rank}") for rank in range(3)]
    executor, engine = executor_of([], ray_worker_handles=handles), Engine()
    executor.workers = None
    ended_ranks.remember(executor, engine, NAMES)
    executor.shutdown()
    assert failures.known_failure().reason == (
        "rank 1 (pid 11, host b) ended: Ray's actor is gone; rank 2 ended: Ray's actor is gone"
    )
    assert waits == [ended_ranks.RAY_NOTICES_SECONDS, 0]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (-9, "ended: killed by SIGKILL"),
        (-11, "ended: killed by SIGSEGV"),
        (3, "ended: exit status 3"),
        (None, "ended: exit status unknown"),
    ],
)
def test_how_it_ended(status, words):
    assert how_it_ended(status) == words


def test_the_summary_names_those_that_had_ended(server_directory, caplog):
    file = CounterFile(server_directory / "rank0.counters", LABELS, INFO)
    file.write(values_of(calls=1, hits=1, tokens=1))
    caplog.set_level(logging.INFO)
    endpoint._log_summary(server_directory)
    assert "ended before" not in caplog.text
    failures.leave_ended_ranks({NAMES[1]: "ended: killed by SIGKILL"})
    endpoint._log_summary(server_directory)
    last = caplog.records[-1].getMessage()
    assert last.startswith("MoE offload, all in all: hit rate: 100.0%")
    assert last.endswith(", ended before: rank 1 (pid 11, host b)")
    file.close()


# ---- a real server -----------------------------------------------------------------------


@pytest.mark.vllm
@pytest.mark.slow
def test_a_killed_rank_is_named_and_a_restart_serves(demo_model, store_dir, tmp_path):
    """Features: which rank was killed; the next start serves; nobody is named after Ctrl-C."""
    model = demo_model("mixtral")
    more = [*PROBE, "--tensor-parallel-size", "2"]
    environment = {
        **ENGINES,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    with serve(model, store_dir, tmp_path / "log", *more, **environment) as server:
        server.wait_healthy()
        expected = complete(server, PROMPTS[0])
        asked = post(server, "collective_rpc", {"method": "moe_offload_process"})
        pid = asked["results"][1]["pid"]
        assert {rank: told["up"] for rank, told in scrape(server).items()} == {"0": 1, "1": 1}
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while (up := scrape(server)["1"]["up"]) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert up == 0
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            complete(server, PROMPTS[1])
        server.process.wait(60)
        lines = server.log.splitlines()
    named = f"rank 1 (pid {pid}, host {os.uname().nodename})"
    assert f"MoE offload: the engine ended: {named} ended: killed by SIGKILL" in lines[-1]
    (summary,) = (line for line in lines if "MoE offload, all in all" in line)
    assert summary.endswith(f", ended before: {named}")

    with serve(model, store_dir, tmp_path / "again", *more, **environment) as server:
        server.wait_healthy()
        assert complete(server, PROMPTS[0]) == expected
        os.killpg(server.process.pid, signal.SIGINT)  # Ctrl-C in a terminal: all ranks get it
        server.process.wait(60)
        log = server.log
    assert "MoE offload, all in all" in log
    assert "ended before" not in log
    assert "the engine ended" not in log
