"""Engines in processes of their own, and the small models they run."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from scripts.demo_model import write_demo_model
from scripts.demo_model.mtp import write_mtp_model
from scripts.engine_environment import engine_environment

if TYPE_CHECKING:
    from scripts.harness.server import Server

DRIVER = Path(__file__).with_name("engine_driver.py")
ARCHS = ("mixtral", "qwen3_moe", "deepseek_v2", "olmoe", "gpt_oss")
MAX_MODEL_LEN = 384
PREFILL_TOKENS = 128
"""max_num_batched_tokens: prompts longer than this are prefilled in chunks."""

ROOT = Path(__file__).resolve().parents[2]
ENGINES = {
    **engine_environment(os.environ),
    "VLLM_LOGGING_LEVEL": "WARNING",
    # Where the project is a folder and not installed, the plugin is found by this.
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
}
"""Environment of processes that run engines."""

LAYERS, EXPERTS, TOP_K = 3, 8, 2
SHAPE = {
    "layers": LAYERS,
    "experts": EXPERTS,
    "top_k": TOP_K,
    "hidden": 128,
    "intermediate": 128,
}

Job = dict[str, Any]
Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session", autouse=True)
def models_inspected_here() -> Iterator[None]:
    """vLLM imports a model's class in a process of its own to ask what it supports, and keeps the
    answer below the home directory: on a new machine a process, and an import of vLLM, for each."""
    from vllm.model_executor.models import registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
        yield


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of the tiny model of an architecture, written once per session."""
    root = tmp_path_factory.mktemp("models")

    def path(arch: str) -> Path:
        directory = root / arch
        if not directory.exists():
            write_demo_model(directory, arch, **SHAPE)
        return directory

    return path


@pytest.fixture(scope="session")
def mtp_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of the tiny model of an architecture that has multi-token prediction, as above."""
    root = tmp_path_factory.mktemp("mtp_models")

    def path(arch: str) -> Path:
        directory = root / arch
        if not directory.exists():
            write_mtp_model(directory, arch, **SHAPE)
        return directory

    return path


@pytest.fixture(scope="session")
def store_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores shared by all engines of the session, as servers of one user would."""
    return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="session")
def run_engines(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs jobs (see engine_driver.py) one after the other in one fresh process, if told to with
    more in its environment."""

    def run(
        jobs: list[Job], environment: Mapping[str, str] = MappingProxyType({})
    ) -> list[dict[str, Any]]:
        directory = tmp_path_factory.mktemp("run")
        (directory / "jobs.json").write_text(json.dumps(jobs))
        done = subprocess.run(
            [
                sys.executable,
                str(DRIVER),
                str(directory / "jobs.json"),
                str(directory / "out.json"),
            ],
            env={**ENGINES, **environment},
            capture_output=True,
            text=True,
            timeout=1200,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
        return json.loads((directory / "out.json").read_text())

    return run


class EngineProcess:
    """A process that runs one list of jobs after the other; it starts with the first."""

    def __init__(self, directory: Path, environment: dict[str, str] = ENGINES) -> None:
        self._directory = directory
        self._environment = environment
        self._process: subprocess.Popen[str] | None = None
        self._lists = 0

    def run(self, jobs: list[Job], *, may_fail: bool = False) -> list[dict[str, Any]]:
        """Results of the jobs. After one that failed and was not to, the next list gets another
        process."""
        self._lists += 1
        paths = [str(self._directory / f"{kind}{self._lists}.json") for kind in ("jobs", "out")]
        Path(paths[0]).write_text(json.dumps(jobs))
        if self._process is not None and self._process.poll() is not None:
            self.stop()
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(paths) + "\n")
        process.stdin.flush()
        answered, _, _ = select.select([process.stdout], [], [], 1200)
        answer = process.stdout.readline() if answered else "nothing in 1200 s"
        if answer != "done\n":
            self.stop()
            raise AssertionError(f"{answer!r}\n{self._log.read_text()[-8000:]}")
        results: list[dict[str, Any]] = json.loads(Path(paths[1]).read_text())
        if not may_fail and any("error" in result for result in results):
            self.stop()
        return results

    @property
    def _log(self) -> Path:
        return self._directory / "log"

    def _start(self) -> subprocess.Popen[str]:
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(DRIVER)],
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        return self._process

    def stop(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            with self._process as process:
                process.kill()
            self._process = None


@pytest.fixture(scope="session")
def share_engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs jobs in two processes for the whole session: without the plugin's work, and with it.

    A process in which nothing was ever offloaded is the reference, and a plain engine that
    another test had already is not started again. Tests of a process's state want
    ``run_engines``.
    """
    plain = EngineProcess(tmp_path_factory.mktemp("plain"))
    offloaded = EngineProcess(tmp_path_factory.mktemp("offloaded"))
    known: dict[str, dict[str, Any]] = {}

    def key(job: Job) -> str:
        return json.dumps(job, sort_keys=True)

    def run(jobs: list[Job]) -> list[dict[str, Any]]:
        stock = [job for job in jobs if "additional_config" not in job["llm"]]
        new = [job for job in stock if key(job) not in known]
        if new:
            known.update(zip(map(key, new), plain.run(new), strict=True))
        ours = [job for job in jobs if job not in stock]
        results = iter(offloaded.run(ours) if ours else [])
        return [known[key(job)] if job in stock else next(results) for job in jobs]

    yield run
    plain.stop()
    offloaded.stop()


@pytest.fixture(scope="session")
def trace_server(
    demo_model: Callable[[str], Path], store_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """`vllm serve` in mode `trace` for all tests that only ask it, whichever comes first.

    Its counters go on from test to test; before the first request they were checked here.
    """
    from tests.integration.served import assert_nothing_is_counted_yet, serve

    log = tmp_path_factory.mktemp("trace_server") / "log"
    with serve(demo_model("mixtral"), store_dir, log) as server:
        server.wait_healthy()
        assert_nothing_is_counted_yet(server)
        yield server


def engine(
    model: Path,
    *,
    eager: bool,
    offload: dict[str, Any] | None = None,
    speculative_config: dict[str, Any] | None = None,
    **extra: Any,
) -> Job:
    """A job: one engine that generates for one prompt, then for eight at once."""
    llm: dict[str, Any] = {
        "model": str(model),
        "enforce_eager": eager,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_batched_tokens": PREFILL_TOKENS,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 64 << 20,
        "seed": 0,
        **extra,
    }
    if offload is not None:
        llm["additional_config"] = {"moe_offload": offload}
    if speculative_config is not None:
        llm["speculative_config"] = speculative_config
    return {"llm": llm, "batches": [[prompt(0, 300)], BATCH], "max_tokens": 12}


def prompt(seed: int, length: int) -> list[int]:
    """Token ids that differ from seed to seed; deterministic."""
    return [10 + (seed * 37 + i * (13 + seed)) % 600 for i in range(length)]


BATCH = [prompt(seed, 10 + 35 * seed) for seed in range(1, 9)]
"""Eight prompts of 45 to 290 tokens: several are prefilled in chunks beside others' decode."""


def assert_recorded(trace: Path, prompts: list[list[int]], max_tokens: int) -> None:
    """All tokens of these requests, and of no others, are in the recorded trace."""
    with np.load(trace, allow_pickle=False) as recorded:
        # The last generated token is never an input.
        computed = [len(tokens) + max_tokens - 1 for tokens in prompts]
        assert sorted(recorded["lens"].tolist()) == sorted(computed)
        assert sorted(recorded["prefill_lens"].tolist()) == sorted(map(len, prompts))
        assert recorded["ids"].shape[0] == sum(computed)


def assert_begins_alike(waves: list[dict[str, Any]], plain: list[dict[str, Any]]) -> None:
    """Requests of engines in float32, one of which served in waves.

    Waves split sums, so only the first generated token's logprobs are compared. In float32: how far
    bfloat16 takes a split sum away depends on the machine's kernel.
    """
    for mine, theirs in zip(waves, plain, strict=True):
        first, expected = mine["logprobs"][0], theirs["logprobs"][0]
        assert first.keys() & expected.keys()
        for token in first.keys() & expected.keys():
            assert float.fromhex(first[token]) == pytest.approx(
                float.fromhex(expected[token]), abs=1e-3
            )
