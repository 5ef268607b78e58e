"""Counters of workers elsewhere: when the engine core asks, and that no answer is lost or doubled."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from vllm import envs
from vllm.v1.executor.multiproc_executor import FutureWrapper

from tests.counter_workers import INFO, LABELS, values_of
from tests.integration.conftest import BATCH, engine
from tests.integration.remote_rank import NAME, RANKS
from tests.integration.served import (
    PROMPTS,
    assert_equal_while_nothing_runs,
    assert_nothing_is_counted_yet,
    complete,
    scrape,
    serve,
)
from vllm_moe_offload import metrics
from vllm_moe_offload.integration import failures, remote_counters, shared_memory
from vllm_moe_offload.integration.counters_dir import ENVIRONMENT
from vllm_moe_offload.integration.remote_counters import (
    POLL_SECONDS,
    RemoteCounters,
    files_of_remote,
)
from vllm_moe_offload.metrics import CounterFile, Counters, read_counters

# ---- an engine core with two workers, without processes ----------------------------------


class Workers:
    """An executor's queue as MultiprocExecutor has it: answers in the order of questions.

    A worker's answer is what it has counted when it gets to the question.
    """

    def __init__(self):
        self.futures = deque()
        self.hits = 0
        self.most_outstanding = 0
        self.asked = 0
        self.failure = None
        self._polls = []

    def ask(self):
        """One question for counters to both workers."""
        if self.failure is not None:
            raise self.failure
        self.asked += 1
        hits = self.hits
        future = FutureWrapper(self.futures, lambda: self._answer(hits))
        self._polls.append(future)
        outstanding = sum(not poll.done() for poll in self._polls)
        self.most_outstanding = max(self.most_outstanding, outstanding)
        return future

    def _answer(self, hits):
        if isinstance(self.failure, Exception):
            raise self.failure
        return [values_of(hits=10 * hits), values_of(hits=hits)]

    def execute(self):
        """One step: both workers count, one answers."""
        self.hits += 1
        output = f"output {self.hits}"
        return FutureWrapper(self.futures, lambda: output)


class Engine:
    """An engine core that steps: a step's output is waited for, or that of the one before it."""

    def __init__(self, directory, depth=1):
        self.now = 1000.0
        self.workers = Workers()
        self.file = CounterFile(directory / "remote1-1-0.counters", LABELS, INFO, "pid 7")
        self.remote = RemoteCounters(self.workers.ask, {1: self.file}, lambda: self.now)
        self.directory = directory
        self.depth = depth
        self.batches = deque()
        self.outputs = []

    def step(self, seconds=0.1, *, is_last=False):
        """Schedules and, if enough is under way or nothing else will come, waits for the oldest."""
        self.remote.before_step(has_requests=True)
        self.now += seconds
        self.batches.append(self.workers.execute())
        while len(self.batches) >= self.depth or (is_last and self.batches):
            self.outputs.append(self.batches.popleft().result())
        self.remote.after_step(has_requests=not is_last)

    def post_step(self):
        """What follows when the step's outputs are on their way."""
        self.remote.settle()

    def reading(self):
        """What an API server sees."""
        (reading,) = read_counters(self.directory)
        return reading


@pytest.fixture
def monotonic(monkeypatch):
    """Readers' clock, set by the test."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock.now)
    return clock


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_outputs_keep_their_order_and_the_last_steps_count(tmp_path, monotonic, depth):
    """With a batch queue (pipeline parallel, asynchronous scheduling) and without."""
    engine = Engine(tmp_path, depth)
    for burst in range(1, 4):
        for number in range(40):
            engine.step(is_last=number == 39)
            engine.post_step()
        assert engine.outputs == [f"output {step + 1}" for step in range(40 * burst)]
        reading = engine.reading()
        assert reading.values["hits"] == engine.workers.hits == 40 * burst
        assert reading.age_seconds == 0
    assert engine.workers.most_outstanding == 1
    # 4 s of work in each burst, and once at its end.
    assert 3 * 4 <= engine.workers.asked <= 3 * 6


def test_while_there_is_work_it_asks_once_in_a_while(tmp_path, monotonic):
    engine = Engine(tmp_path)
    for _ in range(100):
        engine.step(POLL_SECONDS / 10)
        engine.post_step()
    assert 9 <= engine.workers.asked <= 11
    monotonic.now = engine.now
    reading = engine.reading()
    assert engine.workers.hits - 12 <= reading.values["hits"] < engine.workers.hits
    assert 0 < reading.age_seconds <= 1.2 * POLL_SECONDS


def test_an_answer_that_does_not_come_is_told_by_its_age(tmp_path, monotonic):
    engine = Engine(tmp_path, depth=1)
    engine.step()
    answer = engine.remote._answer
    assert answer is not None
    engine.workers.futures.clear()  # nobody answers
    for _ in range(300):
        engine.step()
        engine.post_step()
    assert engine.remote._answer is answer
    assert engine.workers.asked == 1
    monotonic.now = engine.now
    assert engine.reading().age_seconds == pytest.approx(30, abs=1)
    assert engine.reading().values["hits"] == 0


def test_an_engine_that_never_worked_and_one_that_rests_are_never_old(tmp_path, monotonic):
    engine = Engine(tmp_path)
    monotonic.now = engine.now + 1e6
    assert engine.reading().age_seconds == 0
    engine.remote.before_step(has_requests=False)  # ends requests that were aborted
    engine.remote.after_step(has_requests=False)
    engine.remote.settle()
    assert engine.workers.asked == 0
    engine.step(is_last=True)
    engine.post_step()
    monotonic.now = engine.now + 1e6
    assert engine.reading().age_seconds == 0


def test_the_first_step_is_old_from_its_beginning(tmp_path, monotonic):
    """A prompt may take a minute, and a worker may hang in it."""
    engine = Engine(tmp_path)
    engine.remote.before_step(has_requests=True)
    monotonic.now = engine.now + 60
    assert engine.reading().age_seconds == 60


def test_going_idle_while_an_answer_is_outstanding_asks_again(tmp_path, monotonic):
    engine = Engine(tmp_path, depth=3)
    engine.step()  # asked, and not answered: nobody has waited for a later output
    assert engine.workers.asked == 1
    engine.step(is_last=True)
    engine.post_step()
    assert engine.workers.asked == 2
    assert engine.workers.most_outstanding == 1
    assert engine.reading().values["hits"] == 2


def test_readers_wait_for_the_last_figures_and_not_for_ever(tmp_path, monkeypatch):
    engine = Engine(tmp_path)
    clock = SimpleNamespace(now=engine.now, waited=0)
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock.now)

    def sleep(seconds):
        clock.now += seconds
        clock.waited += 1
        if clock.waited == 3:
            engine.post_step()

    monkeypatch.setattr(metrics.time, "sleep", sleep)
    engine.step(seconds=0, is_last=True)  # its output is with the client; post_step comes later
    assert engine.reading().values["hits"] == 1
    assert clock.waited == 3
    engine.step(seconds=0, is_last=True)
    assert engine.reading().values["hits"] == 1  # nobody answers
    assert clock.now == pytest.approx(engine.now + metrics.SETTLE_SECONDS, abs=0.01)
    assert engine.reading().age_seconds > 0


@pytest.mark.parametrize("when", ["asked", "answered"])
def test_an_executor_that_has_ended_ends_the_engine(tmp_path, monotonic, when):
    engine = Engine(tmp_path)
    if when == "asked":
        engine.workers.failure = RuntimeError("Executor failed.")
        with pytest.raises(RuntimeError, match="Executor failed"):
            engine.step()
        return
    engine.step()
    engine.workers.failure = RuntimeError("Worker failed")
    with pytest.raises(RuntimeError, match="Worker failed"):
        engine.step()


def test_a_worker_that_ended_is_not_running_and_is_not_written(tmp_path, monotonic):
    engine = Engine(tmp_path)
    engine.step(is_last=True)
    engine.post_step()
    engine.remote.end([0, 1])
    assert not engine.reading().is_running
    engine.step(is_last=True)
    engine.post_step()
    engine.remote.end([1])
    reading = engine.reading()
    assert not reading.is_running
    assert reading.values["hits"] == 1
    assert reading.age_seconds == 0


# ---- who is elsewhere --------------------------------------------------------------------


def described(counters, **changed):
    """What a worker with these counters answers at the start."""
    runtime = SimpleNamespace(published=counters)
    runner = SimpleNamespace(_moe_offload_runtime=runtime)
    worker = SimpleNamespace(model_runner=runner)
    answer = remote_counters.moe_offload_description(worker)
    assert remote_counters.moe_offload_counters(worker) == answer["values"]
    return {**answer, **changed}


def test_workers_whose_files_are_here_are_left_alone(tmp_path):
    here = CounterFile(tmp_path / "rank0.counters", LABELS, INFO)
    assert files_of_remote(tmp_path, [described(here), None]) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["rank0.counters"]
    here.close()


@pytest.mark.parametrize("where", ["memory", "another directory", "a shared file system"])
def test_workers_elsewhere_get_a_file(tmp_path, where):
    directory, other = tmp_path / "here", tmp_path / "there"
    directory.mkdir()
    other.mkdir()
    labels = {**LABELS, "rank": "1"}
    changed = {}
    if where == "memory":
        counters = Counters(labels, INFO, "pid 7, host b")
    elif where == "another directory":
        counters = CounterFile(other / "rank1.counters", labels, INFO, "pid 7, host b")
    else:
        counters = CounterFile(directory / "rank1.counters", labels, INFO, "pid 7, host b")
        changed = {"boot": "that of another host"}
    counters.write(values_of(slots=5, hits=3))
    files = files_of_remote(directory, [None, described(counters, **changed)])
    assert list(files) == [1]
    (reading,) = read_counters(directory)
    assert reading.labels == labels
    assert reading.infos == (INFO,)
    assert reading.name == "rank 1 (pid 7, host b)"
    assert (reading.values["slots"], reading.values["hits"]) == (5, 3)
    again = files_of_remote(
        directory, [described(Counters(LABELS))]
    )  # the process's next engine
    assert len(list(read_counters(directory))) == 2
    for file in (*files.values(), *again.values()):
        file.close()
    counters.close()


def test_a_worker_without_offloaded_layers_has_no_counters():
    worker = SimpleNamespace(model_runner=SimpleNamespace(_moe_offload_runtime=None))
    assert remote_counters.moe_offload_description(worker) is None
    assert remote_counters.moe_offload_counters(worker) is None


def test_a_start_of_this_host_has_one_name(monkeypatch, tmp_path):
    assert shared_memory.boot_id() == shared_memory.boot_id()
    monkeypatch.setattr(shared_memory, "_BOOT_ID", tmp_path / "missing")
    assert shared_memory.boot_id() == ""


# ---- the engine core's part --------------------------------------------------------------


def engine_core_of(descriptions, requests):
    """An engine core of a class of its own, whose workers have these descriptions.

    Args:
        descriptions: answers of its workers at the start.
        requests: how many there are before and after each step.
    """
    asked = []

    class EngineCore:
        def step(self):
            return {}, True

        step_with_batch_queue = step

        def post_step(self, model_executed):
            return f"after a step, {model_executed}"

    def collective_rpc(method, timeout=None, non_block=False):
        asked.append((method, timeout, non_block))
        if method == "moe_offload_description":
            return descriptions
        answer = Future()
        answer.set_result([values_of(hits=len(asked)) for _ in descriptions])
        return answer

    core = EngineCore()
    core.model_executor = SimpleNamespace(collective_rpc=collective_rpc)
    counts = iter(requests)
    core.scheduler = SimpleNamespace(has_unfinished_requests=lambda: bool(next(counts)))
    return core, asked


def test_without_workers_elsewhere_steps_are_vllms_own(tmp_path, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    here = CounterFile(tmp_path / "rank0.counters", LABELS, INFO)
    core, asked = engine_core_of([described(here)], [])
    own = dict(vars(type(core)))
    remote_counters.begin(core)
    assert dict(vars(type(core))) == own
    assert asked == [("moe_offload_description", None, False)]
    here.close()


def test_a_step_asks_without_waiting_and_with_the_limit_of_steps(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    caplog.set_level("INFO")
    counters = Counters(LABELS, INFO, "pid 7, host b")
    core, asked = engine_core_of([described(counters)], [1, 1, 1, 0])
    remote_counters.begin(core)
    assert "rank 0 (pid 7, host b) cannot write into this server's directory" in caplog.text
    question = ("moe_offload_counters", envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS, True)
    assert core.step() == ({}, True)
    assert core.post_step(True) == "after a step, True"
    assert asked[1:] == [question]
    assert core.step_with_batch_queue() == ({}, True)  # the last request's
    assert core.post_step(model_executed=False) == "after a step, False"
    assert asked[1:] == [question] * 2
    (reading,) = read_counters(tmp_path)
    assert reading.values["hits"] == 3
    core.moe_offload_remote.end([0])


def test_what_a_worker_elsewhere_fails_of_is_left_for_the_front_end(tmp_path, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    monkeypatch.setattr(failures, "_front_end", None)
    core, _ = engine_core_of([described(Counters(LABELS, INFO))], [1])

    def fail(self):
        raise RuntimeError("Worker failed with error 'cannot read expert 3'")

    type(core).step = fail
    remote_counters.begin(core)
    with pytest.raises(RuntimeError, match="cannot read"):
        core.step()
    assert failures.known_failure().reason.endswith("'cannot read expert 3'")
    core.moe_offload_remote.end([0])


# ---- real engines ------------------------------------------------------------------------


def offline(model, store_dir):
    """A job with two ranks that tell what they count; which of them is elsewhere, its environment
    says."""
    options = {"mode": "lrfu", "cache_gb": "50%", "store_dir": str(store_dir)}
    job = engine(
        model,
        eager=True,
        offload=options,
        tensor_parallel_size=2,
        disable_log_stats=False,
        worker_extension_cls=NAME,
    )
    return job | {"facts": False}


def ranks_elsewhere(result):
    """Files that the engine core wrote in the place of workers."""
    files = result["counter_files"]
    assert len(files) == 2
    return [name.partition("-")[0] for name in files if name.startswith("remote")]


def assert_told_is_true(result):
    """LLM.get_metrics right after the last answer, against what the workers count themselves."""
    assert sorted(result["metrics_by_rank"]) == ["0", "1"]
    for rank, truth in enumerate(result["truth"]):
        told = result["metrics_by_rank"][str(rank)]
        # vLLM cuts counters to whole numbers there.
        assert told == {
            name.removesuffix("_total"): int(value) for name, value in truth.items()
        }
        assert told["hits"] > 0


@pytest.mark.vllm
@pytest.mark.slow
def test_counters_of_ranks_elsewhere_are_those_of_ranks_here(
    demo_model, store_dir, run_engines
):
    """Feature: LLM.get_metrics with all ranks on other hosts, the engine core in its process."""
    job = offline(demo_model("mixtral"), store_dir)
    # In one process the same requests are in every step; in two, when they arrive decides.
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    here, elsewhere = (
        run_engines([job], {**environment, RANKS: ranks})[0] for ranks in ("", "0,1")
    )
    assert ranks_elsewhere(elsewhere) == ["remote0", "remote1"]
    assert ranks_elsewhere(here) == []
    assert elsewhere["batches"] == here["batches"]
    for result in (here, elsewhere):
        assert_told_is_true(result)
        for told in result["metrics_by_rank"].values():
            del told["stall_seconds"]
    assert elsewhere["metrics_by_rank"] == here["metrics_by_rank"]


@pytest.mark.vllm
@pytest.mark.slow
def test_the_last_burst_counts_though_the_engine_core_is_another_process(
    demo_model, store_dir, run_engines
):
    """Feature: LLM.get_metrics with a rank on another host, asked right after the last answer."""
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        RANKS: "1",
    }
    (result,) = run_engines([offline(demo_model("mixtral"), store_dir)], environment)
    assert ranks_elsewhere(result) == ["remote1"]
    assert_told_is_true(result)


@pytest.mark.vllm
@pytest.mark.slow
def test_metrics_of_a_server_with_a_rank_elsewhere(demo_model, store_dir, tmp_path):
    """Features: /metrics, the stats line and the summary with a rank on another host."""
    more = ["--tensor-parallel-size", "2", "--worker-extension-cls", NAME]
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", RANKS: "1"}
    model = demo_model("mixtral")
    with serve(model, store_dir, tmp_path / "log", *more, **environment) as server:
        server.wait_healthy()
        assert_nothing_is_counted_yet(server, num_ranks=2)
        for tokens in PROMPTS:
            complete(server, tokens)
            told = {rank: one["hits_total"] for rank, one in scrape(server).items()}
            truth = assert_equal_while_nothing_runs(server)
            assert told == {rank: one["hits_total"] for rank, one in truth.items()}
        for tokens in BATCH:
            complete(server, tokens)
        ranks = assert_equal_while_nothing_runs(server)
        server.stop()
        log = server.log
    needed = [told["hits_total"] + told["misses_total"] for told in ranks.values()]
    assert needed[0] == needed[1] > 0
    assert "MoE offload: rank 1 (pid " in log
    assert "counters are asked for every 1 s" in log
    assert "MoE offload, all in all: hit rate" in log
    assert "no counters of" not in log
