"""Forty requests are served and recorded; what cannot be is refused before vLLM starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.demo_model import write_demo_model
from scripts.record_routing import main
from vllm_moe_offload.replay.run import recorded_schedule
from vllm_moe_offload.trace.routing import load_trace

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere", "t.npz"], "nowhere is no checkpoint"),
        (["{model}", "t.txt"], "must end in .npz"),
        (["{model}", "nowhere/t.npz"], "nowhere is no directory"),
        (["{model}", "t.npz", "--concurrency", "0"], "concurrency must be at least 1"),
        (["{model}", "t.npz", "--mode", "off"], "mode is 'off'"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        main([argument.replace("{model}", str(tmp_path)) for argument in arguments])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.vllm
def test_forty_requests_are_recorded(tmp_path: Path) -> None:
    """Feature: the script that records what the replay benchmarks replay."""
    model, path = tmp_path / "model", tmp_path / "trace.npz"
    shape = {"layers": 2, "experts": 8, "top_k": 2, "hidden": 128, "intermediate": 64}
    write_demo_model(model, "mixtral", **shape)
    arguments = [model, path, "--concurrency", "4", "--max-tokens", "3"]
    subprocess.run(
        [sys.executable, "scripts/record_routing.py", *map(str, arguments)],
        check=True,
        cwd=ROOT,
        # With four tokens at a time, two threads do little but wait for each other.
        env=os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"},
    )
    trace = load_trace(path)
    assert trace.num_requests == 40
    schedule = recorded_schedule(trace)
    together = [len(schedule.tokens(step).requests) for step in range(schedule.num_steps)]
    assert max(together) == 4
