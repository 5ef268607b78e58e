"""Both commands, with real servers and the model that needs no network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def run(module: str, directory: Path, typed: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, "--planted", "--directory", str(directory)],
        input=typed,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.vllm
@pytest.mark.slow
def test_demo_and_conversation(tmp_path: Path) -> None:
    """Feature: the demo, its two servers on one store, and the conversation after it."""
    shown = run("scripts.demo", tmp_path)
    assert "4 of 4 answers are the same" in shown
    assert shown.count(" tokens/s, ") == 4
    assert "What to do next" in shown
    assert len(list((tmp_path / "store").glob("mixtral-*"))) == 1

    shown = run("scripts.demo.chat", tmp_path, "Tell me about the sea.\nAnd rivers?\n/exit\n")
    assert shown.count(" tokens/s, ") == 2
    assert "> Tell me about the sea." in shown
    assert shown.endswith("Server stopped.\n")
