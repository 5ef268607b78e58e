"""Messages of docs/troubleshooting.md as users see them: the last line, and the exit status."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.harness.server import Server
from tests.hub import make_hub_cache
from tests.integration.conftest import ENGINES
from tests.integration.served import ARGUMENTS, PROMPTS, complete, serve
from tests.messages.engine import ENGINE
from tests.messages.page import fits
from tests.messages.serve import OPTION, SERVE, Case

pytestmark = pytest.mark.vllm

CACHED = "demo/tiny-moe"
"""A hub's name that the commands find in a cache."""
DRIVER = Path(__file__).with_name("command_driver.py")


@pytest.fixture(scope="module")
def commands(demo_model, tmp_path_factory) -> Iterator[Callable[..., tuple[int, str]]]:
    """Runs `vllm` command lines; gives exit status and output."""
    directory = tmp_path_factory.mktemp("commands")
    log, cache = directory / "log", directory / "hub"
    make_hub_cache(cache, CACHED, demo_model("mixtral"))
    process = subprocess.Popen(
        [sys.executable, str(DRIVER)],
        env={**ENGINES, "HF_HUB_CACHE": str(cache)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def run(argv: list[str], **request: Any) -> tuple[int, str]:
        request = {"argv": argv, "environment": {}, "patch": None, "log": str(log), **request}
        print(json.dumps(request), file=process.stdin, flush=True)
        answer = process.stdout.readline()
        assert answer, f"the driver ended with status {process.wait()}"
        return int(answer), log.read_text()

    with process:
        yield run
        process.kill()


def arguments(case: Case, model: Path, tmp_path: Path) -> list[str]:
    """The command line of a case, on the model or a spoilt copy of it."""
    if case.change is not None:
        model = Path(shutil.copytree(model, tmp_path / "model"))
        case.change(model)
    empty = tmp_path / "empty"
    empty.mkdir()
    stores = ["--moe-offload-config.store_dir", str(tmp_path / "stores")] if case.mode else []
    options = [
        text.format(tmp=empty, model=model) if "{tmp}" in text or "{model}" in text else text
        for text in case.options
    ]
    mode = ["--moe-offload=trace"] if case.mode else []
    return ["serve", str(model), "--max-model-len", "128", *mode, *stores, *options]


@pytest.mark.parametrize("message", SERVE)
def test_what_the_front_end_finds(message, commands, demo_model, tmp_path):
    """Feature: what is refused before a process starts is one line, with its exit status."""
    case = SERVE[message]
    argv = arguments(case, demo_model("mixtral"), tmp_path)
    status, output = commands(argv, environment=dict(case.environment), patch=case.patch)
    assert fits(message.removeprefix("vllm serve: error: "), output.splitlines()[-1]), output
    assert status == case.status, output
    if status == OPTION:
        assert "Traceback" not in output


def test_a_name_is_found_in_the_cache_before_a_process_starts(commands, tmp_path):
    """Feature: a hub's name without network."""
    message = next(message for message in SERVE if message.startswith("moe-offload: cache_gb="))
    status, output = commands(arguments(SERVE[message], Path(CACHED), tmp_path))
    assert fits(message, output.splitlines()[-1]), output
    assert status == OPTION


def run_server(model: Path, case: Case, tmp_path: Path) -> tuple[int, str]:
    """Status and output of a server whose engine does not start."""
    argv = arguments(case, model, tmp_path)
    log = tmp_path / "log"
    with Server(
        argv[1], [*ARGUMENTS, *argv[2:]], log=log, environment=environment(case)
    ) as server:
        return server.process.wait(200), server.log


def environment(case: Case) -> dict[str, str]:
    """Of a server; a front end with an engine core and workers of its own."""
    return {**ENGINES, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **case.environment}


NOT_STARTED = list(ENGINE)[:2]


@pytest.mark.parametrize("message", NOT_STARTED)
def test_what_ends_a_start(message, demo_model, tmp_path):
    """Features: a reason that a rank's worker, or the engine core, finds is the last line."""
    case = ENGINE[message]
    status, output = run_server(demo_model("mixtral"), case, tmp_path)
    assert fits(message, output.splitlines()[-1]), output[-4000:]
    assert status == case.status
    assert ("Traceback" in output) == (status != OPTION)


def test_what_ends_a_running_engine(demo_model, tmp_path):
    """Feature: why an engine ended is the last line of its server."""
    ended, read = list(ENGINE)[2:]
    log, stores = tmp_path / "log", tmp_path / "stores"
    with serve(demo_model("mixtral"), stores, log, **environment(ENGINE[ended])) as server:
        server.wait_healthy()
        (experts,) = stores.glob("*/whole/experts.bin")
        os.truncate(experts, 4096)
        with pytest.raises(urllib.error.HTTPError):
            complete(server, PROMPTS[0])
        server.process.wait(60)
        last = server.log.splitlines()[-1]
    assert fits(ended, last), server.log[-4000:]
    assert fits(read, last)
