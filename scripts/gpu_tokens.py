"""Are the plugin's tokens plain vLLM's? A tiny Qwen3-MoE, without graphs and with, in one process.

    python scripts/gpu_tokens.py --device cuda --work-dir DIR

Starts four engines, one after the other: plain and offloaded without graphs, then both with
piecewise CUDA graphs (on a CPU: compiled). Half of the experts have slots. Prompts come alone, then
eight at once; a long one is cut into chunks. After each engine a finding says how it ended, after
each pair whether tokens and logprobs are the same, bit by bit (scripts/gpu_findings.py).

vLLM logs at DEBUG: its graphs then check at every replay that their inputs lie where they lay at
capture. On a CPU the offloaded engine without graphs is served as by a GPU, through a simulated copy
engine (tests/integration/simulated_gpu.py).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

os.environ.setdefault("VLLM_LOGGING_LEVEL", "DEBUG")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from scripts.gpu_findings import note  # noqa: E402

ARCH = "qwen3_moe"
SHAPE: dict[str, Any] = {
    "layers": 3,
    "experts": 8,
    "top_k": 2,
    "hidden": 128,
    "intermediate": 128,
}
PAIRS = ("eager", "graphs")


def job(
    pair: str, offload: Mapping[str, Any] | None, *, model: Path, device: str
) -> dict[str, Any]:
    """An engine for tests/integration/engine_driver.py."""
    from tests.integration.conftest import engine

    options: dict[str, Any] = {}
    if device == "cuda":
        options |= {"dtype": "bfloat16", "moe_backend": "triton", "gpu_memory_utilization": 0.5}
        if pair == "graphs":
            options["compilation_config"] = {
                "cudagraph_mode": "PIECEWISE",
                "backend": "eager",  # Dynamo without Inductor: a start takes seconds
                "cudagraph_capture_sizes": [1, 8],
            }
    described: dict[str, Any] = engine(
        model,
        eager=pair == "eager",
        offload=dict(offload) if offload is not None else None,
        **options,
    )
    if device == "cpu" and pair == "eager" and offload is not None:
        described["simulated_gpu"] = 1.0
    return described


def compare(plain: Mapping[str, Any], offloaded: Mapping[str, Any]) -> dict[str, Any]:
    """How far what the offloaded engine generated is what the plain one did."""
    errors = [result["error"] for result in (plain, offloaded) if "error" in result]
    if errors:
        return {"equal": False, "reason": errors[0]}
    pairs = [
        (one, other)
        for batch, others in zip(plain["batches"], offloaded["batches"], strict=True)
        for one, other in zip(batch, others, strict=True)
    ]
    same_tokens = sum(one["ids"] == other["ids"] for one, other in pairs)
    same_logprobs = sum(one["logprobs"] == other["logprobs"] for one, other in pairs)
    facts = offloaded["facts"]
    offloads = all(name.startswith("Offloaded") for name in facts["classes"])
    found = {
        "requests": len(pairs),
        "same_tokens": same_tokens,
        "same_logprobs": same_logprobs,
        "misses": facts.get("misses"),
        "hits": facts.get("hits"),
    }
    if not offloads or not facts["misses"]:
        return found | {"equal": False, "reason": f"nothing was offloaded: {facts}"}
    differs = next((n for n, (one, other) in enumerate(pairs) if one != other), None)
    if differs is not None:
        one, other = pairs[differs]
        found["first_difference"] = {
            "request": differs,
            "plain": one["ids"],
            "offloaded": other["ids"],
        }
    return found | {"equal": same_tokens == len(pairs)}


def without_inductor() -> None:
    """Logprobs are ranked by a function that vLLM compiles: let Dynamo alone do that.

    Inductor would need a compiler, and on a GPU half a minute of the step's time.
    """
    from vllm.platforms import current_platform

    type(current_platform).simple_compile_backend = "eager"


def main() -> int:
    """Exit status 0 if the tokens of all pairs are the same."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--work-dir", type=Path, required=True, help="of model and store")
    args = parser.parse_args()
    from scripts.demo_model import write_demo_model

    model, store = args.work_dir / "model", args.work_dir / "store"
    write_demo_model(model, ARCH, force=True, **SHAPE)
    began = time.perf_counter()
    without_inductor()
    from tests.integration.engine_driver import run_job

    note("imported", seconds=round(time.perf_counter() - began, 2))
    offload = {"mode": "trace", "cache_gb": "50%", "store_dir": str(store)}
    all_equal = True
    for pair in PAIRS:
        results = []
        for name, options in (("plain", None), ("offloaded", offload)):
            result = run_job(job(pair, options, model=model, device=args.device))
            results.append(result)
            note(
                f"{pair}, {name}",
                started_in_s=round(result.get("start_seconds", 0.0), 2),
                ran_for_s=round(result.get("run_seconds", 0.0), 2),
                error=result.get("error"),
                trace=result.get("trace"),
            )
        verdict = compare(*results)
        note(pair, **verdict)
        all_equal = all_equal and verdict["equal"]
    return int(not all_equal)


if __name__ == "__main__":
    sys.exit(main())
