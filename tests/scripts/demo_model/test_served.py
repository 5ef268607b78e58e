"""Models of default size behave in vLLM like real ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.demo_model import ARCHS, write_demo_model

ROOT = Path(__file__).resolve().parents[3]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""With a token at a time, two threads do little but wait for each other."""
OTHERS = [pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHS if arch != "mixtral"]


@pytest.fixture(scope="module", params=["mixtral", *OTHERS])
def observed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What ``observe.py`` reports of a default-sized checkpoint."""
    model = tmp_path_factory.mktemp("served") / request.param
    write_demo_model(model, request.param)
    done = subprocess.run(
        [sys.executable, "-m", "tests.scripts.demo_model.observe", model],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | ONE_THREAD,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(request.param, {k: v for k, v in report.items() if k != "texts"})
    return report


@pytest.mark.vllm
def test_served_model_routes_like_real_ones(observed: dict[str, Any]) -> None:
    """Feature: demo models. The ranges are those of real models (gpt-oss, OLMoE, Mixtral,
    DeepSeek-V2-Lite)."""
    assert 0.27 <= observed["reuse"] <= 0.52
    assert observed["reuse"] > observed["reuse_far"]
    assert 0.5 <= observed["lru_hit_rate"] <= 0.78
    # All requests together need far more experts than one alone.
    assert observed["own_share"] > observed["common_share"] + 0.03


@pytest.mark.vllm
def test_served_model_computes_what_transformers_computes(observed: dict[str, Any]) -> None:
    assert observed["transformers_difference"] < 0.1


@pytest.mark.vllm
def test_wrong_expert_shows_in_logprobs(observed: dict[str, Any]) -> None:
    assert observed["repeated_difference"] == 0
    assert min(observed["wrong_expert_difference"]) > 0.03


@pytest.mark.vllm
def test_served_text_does_not_collapse(observed: dict[str, Any]) -> None:
    assert observed["repeats"] < 0.1
    assert observed["greedy_distinct"] >= 4
