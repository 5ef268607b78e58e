"""What the engines of each case are given, and what counts as the same; they run in the rehearsal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scripts import gpu_tokens
from scripts.gpu_tokens import CASES, UNQUANTISED, compare

OFFLOAD = {"mode": "trace"}


def job_of(name: str, device: str, offload: dict[str, Any] | None = OFFLOAD) -> dict[str, Any]:
    return gpu_tokens.job(CASES[name], offload, model=Path("model"), device=device)


@pytest.fixture(autouse=True)
def any_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tokens, "moe_backend", lambda quantization: "triton")


def test_both_routers_run_in_every_kind_of_graph() -> None:
    asked = {(CASES[name].arch, CASES[name].graphs) for name in UNQUANTISED}
    kinds = (None, "PIECEWISE", "FULL", "FULL_AND_PIECEWISE")
    assert asked == {(arch, kind) for arch in ("qwen3_moe", "deepseek_v3") for kind in kinds}


@pytest.mark.parametrize("name", UNQUANTISED)
def test_a_pair_differs_in_the_plugin_alone(name: str) -> None:
    plain, offloaded = job_of(name, "cuda", None), job_of(name, "cuda")
    assert offloaded["llm"].pop("additional_config") == {"moe_offload": OFFLOAD}
    assert plain == offloaded
    case = CASES[name]
    assert plain["llm"]["enforce_eager"] is (case.graphs is None)
    graphs = plain["llm"].get("compilation_config", {}).get("cudagraph_mode")
    assert graphs == case.graphs


def test_graphs_are_padded() -> None:
    job = job_of("qwen3_moe, FULL", "cuda")
    assert [len(batch) for batch in job["batches"]] == [1, 3, 5]
    captured = job["llm"]["compilation_config"]["cudagraph_capture_sizes"]
    assert not {3, 5} & set(captured)


def test_a_cpu_has_doubles_of_a_gpu_and_no_graphs() -> None:
    assert gpu_tokens.obstacle(CASES["qwen3_moe, FULL"], "cpu") == "a CPU has no CUDA graphs"
    assert gpu_tokens.obstacle(CASES["deepseek_v3, eager"], "cpu") is None
    assert "simulated_device" in job_of("deepseek_v3, eager", "cpu")
    assert "simulated_gpu" in job_of("int4", "cpu")
    assert "simulated_device" not in job_of("deepseek_v3, eager", "cpu", None)


def result(ids: list[int], logprob: str, misses: int = 3) -> dict[str, Any]:
    facts = {"classes": ["OffloadedRoutedExperts"], "misses": misses, "hits": 1}
    return {"batches": [[{"ids": ids, "logprobs": [{"1": logprob}]}]], "facts": facts}


def test_tokens_and_logprobs_have_to_be_the_same() -> None:
    plain = result([1, 2], "0x1p-1")
    assert compare(plain, result([1, 2], "0x1p-1"))["equal"]
    assert not compare(plain, result([1, 3], "0x1p-1"))["equal"]
    assert not compare(plain, result([1, 2], "0x1p-2"))["equal"]
    nothing = compare(plain, result([1, 2], "0x1p-1", misses=0))
    assert not nothing["equal"]
    assert nothing["reason"].startswith("nothing was offloaded")
    assert compare(plain, {"error": "no"}) == {"equal": False, "reason": "no"}
