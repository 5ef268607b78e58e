"""Plain vLLM reads every format, and computes what the same weights in bfloat16 do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from scripts.demo_model import write_demo_model
from scripts.engine_environment import engine_environment
from scripts.quantize import FORMATS, quantize
from tests.scripts.demo_model.checkpoints import tensors_of
from tests.scripts.quantize.reference import dequantised

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.cpu._is_amx_tile_supported(),
        reason="vLLM's CPU kernels for quantised experts need AMX",
    ),
]

ROOT = Path(__file__).resolve().parents[3]
DRIVER = ROOT / "tests" / "integration" / "engine_driver.py"
SHAPE = {"layers": 2, "experts": 8, "top_k": 2, "hidden": 512, "intermediate": 256}
PROMPTS = [[10 + (seed * 37 + i * (13 + seed)) % 600 for i in range(60)] for seed in range(16)]
ON_CPUS = tuple(format for format in FORMATS if format != "nvfp4")
"""What vLLM has kernels for on a CPU."""
TOP = 5
"""Logprobs that the driver writes of every token."""


def write_pair(plain: Path, root: Path, format: str) -> tuple[Path, Path]:
    """``plain`` in ``format``, and what that stands for in bfloat16."""
    quantised, rounded = root / format, root / f"{format}-dequantised"
    quantize(plain, quantised, format, group_size=64)
    rounded.mkdir()
    for path in plain.iterdir():
        if "safetensors" not in path.name:
            shutil.copyfile(path, rounded / path.name)
    save_file(dequantised(tensors_of(quantised), format), rounded / "model.safetensors")
    return quantised, rounded


def job(model: Path) -> dict[str, Any]:
    """One token for every prompt: what is compared does not depend on what came before."""
    llm = {
        "model": str(model),
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 64 << 20,
        "seed": 0,
    }
    return {"llm": llm, "batches": [PROMPTS], "max_tokens": 1}


def logprobs_of(result: dict[str, Any]) -> list[dict[str, float]]:
    """Of the most probable first tokens, per prompt."""
    assert "error" not in result, result["trace"]
    return [
        {token: float.fromhex(value) for token, value in output["logprobs"][0].items()}
        for output in result["batches"][0]
    ]


def difference(these: list[dict[str, float]], those: list[dict[str, float]]) -> float:
    """Mean over all tokens that are among the most probable of both."""
    apart = [
        abs(one[token] - other[token])
        for one, other in zip(these, those, strict=True)
        for token in one.keys() & other.keys()
    ]
    # Nearly the same tokens are the most probable.
    assert len(apart) >= 0.8 * TOP * len(these)
    return sum(apart) / len(apart)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By name of a directory, what the driver wrote of it."""
    root = tmp_path_factory.mktemp("quantised")
    for arch in ("qwen3_moe", "gpt_oss"):
        write_demo_model(root / arch, arch, **SHAPE)
    models = [root / "qwen3_moe", root / "gpt_oss"]
    for format in ON_CPUS:
        models += write_pair(models[format == "mxfp4"], root, format)
    jobs, out = root / "jobs.json", root / "out.json"
    jobs.write_text(json.dumps([job(model) for model in models]))
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(jobs), str(out)],
        env=engine_environment(os.environ) | {"VLLM_LOGGING_LEVEL": "WARNING"},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return {
        model.name: result
        for model, result in zip(models, json.loads(out.read_text()), strict=True)
    }


@pytest.mark.parametrize("format", ON_CPUS)
def test_vllm_computes_what_the_weights_stand_for(
    results: dict[str, dict[str, Any]], format: str
) -> None:
    quantised = logprobs_of(results[format])
    rounded = logprobs_of(results[f"{format}-dequantised"])
    plain = logprobs_of(results["gpt_oss" if format == "mxfp4" else "qwen3_moe"])
    near, far = difference(quantised, rounded), difference(plain, rounded)
    print(f"{format}: {near:.4f} from its weights in bfloat16, {far:.4f} to the model's")
    assert near < 0.03
    # Rounding to eight bits a row changes less than the kernel's rounding of activations does.
    if format != "int8":
        assert near < far / 2
