"""Messages of docs/troubleshooting.md as users see them: the last line, and the exit status."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import ENGINES
from tests.messages.page import fits
from tests.messages.serve import OPTION, SERVE, Case

pytestmark = pytest.mark.vllm

DRIVER = Path(__file__).with_name("command_driver.py")


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> Iterator[Callable[..., tuple[int, str]]]:
    """Runs `vllm` command lines; gives exit status and output."""
    log = tmp_path_factory.mktemp("commands") / "log"
    process = subprocess.Popen(
        [sys.executable, str(DRIVER)],
        env=ENGINES,
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
