"""Are the plugin's tokens plain vLLM's? Tiny models, without graphs and with, in one process.

    python scripts/gpu_tokens.py --device cuda --work-dir DIR [--cases eager graphs int4 fp8]

For each case two engines, one after the other: plain and offloaded, half of the experts with slots.
``eager``, ``graphs``: a Qwen3-MoE in bf16, without graphs and with piecewise CUDA graphs (on a CPU:
compiled). ``int4``, ``fp8``: quantised, without graphs, on vLLM's Marlin and Triton kernels. Prompts
come alone, then eight at once; a long one is cut into chunks. After each engine a finding says how it
ended, after each pair whether tokens and logprobs are the same, bit by bit (scripts/gpu_findings.py).

vLLM logs at DEBUG: its graphs then check at every replay that their inputs lie where they lay at
capture. On a CPU offloaded engines without graphs are served as by a GPU, through a simulated copy
engine and doubles for Marlin's operators (tests/integration/simulated_gpu.py, simulated_marlin.py).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

os.environ.setdefault("VLLM_LOGGING_LEVEL", "DEBUG")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from scripts.gpu_findings import note  # noqa: E402

ARCH = "qwen3_moe"


@dataclass(frozen=True, slots=True)
class Case:
    """A pair of engines.

    Attributes:
        format: of scripts/quantize; None: bf16.
        quantization: vLLM's name of it.
        eager: without graphs.
    """

    name: str
    format: str | None = None
    quantization: str | None = None
    eager: bool = True

    @property
    def shape(self) -> dict[str, Any]:
        """Of the model: quantised kernels have least sizes."""
        width = 128 if self.format is None else 512
        return {
            "layers": 3,
            "experts": 8,
            "top_k": 2,
            "hidden": width,
            "intermediate": max(128, width // 2),
        }


CASES = {
    case.name: case
    for case in (
        Case("eager"),
        Case("graphs", eager=False),
        Case("int4", "int4", "compressed-tensors"),
        Case("fp8", "fp8", "fp8"),
    )
}
UNQUANTISED = ("eager", "graphs")


def write_model(case: Case, work_dir: Path) -> Path:
    """The case's model, new."""
    from scripts.demo_model import write_demo_model
    from scripts.quantize import quantize

    plain = work_dir / "model"
    write_demo_model(plain, ARCH, force=True, **case.shape)
    if case.format is None:
        return plain
    quantised = work_dir / f"model-{case.format}"
    quantize(plain, quantised, case.format, force=True)
    return quantised


def job(
    case: Case, offload: Mapping[str, Any] | None, *, model: Path, device: str
) -> dict[str, Any]:
    """An engine for tests/integration/engine_driver.py."""
    from tests.integration.conftest import engine

    on_cpu = device == "cpu"
    options: dict[str, Any] = {}
    if not on_cpu:
        options |= {
            "dtype": "bfloat16",
            "moe_backend": moe_backend(case.quantization),
            "gpu_memory_utilization": 0.5,
        }
        if not case.eager:
            options["compilation_config"] = {
                "cudagraph_mode": "PIECEWISE",
                "backend": "eager",  # Dynamo without Inductor: a start takes seconds
                "cudagraph_capture_sizes": [1, 8],
            }
    simulated: dict[str, Any] = {}
    if on_cpu and case.eager and offload is not None:
        simulated["simulated_gpu"] = 1.0
    if on_cpu and case.format is not None:
        simulated["cpu_kernels"] = cpu_kernels()
        if offload is not None:
            offload = {**offload, "cpu_kernels": cpu_kernels()}
    if on_cpu and case.format == "int4":
        simulated["simulated_marlin"] = True
        options["moe_backend"] = "marlin"
    described: dict[str, Any] = engine(
        model,
        eager=case.eager,
        offload=None if offload is None else dict(offload),
        **options,
    )
    return described | simulated


def moe_backend(quantization: str | None) -> str:
    """The kernel that the plugin asks for on this GPU."""
    import torch

    from vllm_moe_offload.integration import formats

    return formats.moe_backends(quantization, torch.cuda.get_device_capability())[0]


def cpu_kernels() -> str:
    """The plugin's option for a rehearsal on this CPU."""
    from vllm_moe_offload.integration import cpu_kernels as kernels

    return "vllm" if kernels.has_amx() else "avx512"


def obstacle(case: Case, device: str) -> str | None:
    """Why a case cannot be rehearsed on this CPU."""
    if device != "cpu" or case.format is None:
        return None
    from vllm_moe_offload.integration import cpu_kernels as kernels

    lacking = kernels.missing()
    return f"this CPU has no {', '.join(lacking)}" if lacking else None


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
    parser.add_argument("--work-dir", type=Path, required=True, help="of models and stores")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=UNQUANTISED)
    args = parser.parse_args()
    began = time.perf_counter()
    without_inductor()
    from tests.integration.engine_driver import run_job

    note("imported", seconds=round(time.perf_counter() - began, 2))
    all_equal = True
    for case in (CASES[name] for name in args.cases):
        why_not = obstacle(case, args.device)
        if why_not is not None:
            note(case.name, left_out=why_not)
            continue
        model = write_model(case, args.work_dir)
        store = args.work_dir / "store"
        offload = {"mode": "trace", "cache_gb": "50%", "store_dir": str(store)}
        results = []
        for name, options in (("plain", None), ("offloaded", offload)):
            result = run_job(job(case, options, model=model, device=args.device))
            results.append(result)
            note(
                f"{case.name}, {name}",
                started_in_s=round(result.get("start_seconds", 0.0), 2),
                ran_for_s=round(result.get("run_seconds", 0.0), 2),
                error=result.get("error"),
                trace=result.get("trace"),
            )
        verdict = compare(*results)
        note(case.name, **verdict)
        all_equal = all_equal and verdict["equal"]
    return int(not all_equal)


if __name__ == "__main__":
    sys.exit(main())
