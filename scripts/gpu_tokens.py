"""Are the plugin's tokens plain vLLM's? Tiny models, without graphs and with, in one process.

    python scripts/gpu_tokens.py --device cuda --work-dir DIR [--cases CASE ...]

For each case two engines, one after the other: plain and offloaded, half of the experts with slots.
A Qwen3-MoE and a DeepSeek-V3, whose grouped router gives padding experts like any other, in bf16:
without graphs (``eager``) and with each of vLLM's kinds of CUDA graphs, planned by the GPU. ``int4``,
``fp8``: quantised, planned by the host, on vLLM's Marlin and Triton kernels. One, three and five
prompts come at once, so that graphs are padded; long ones are cut into chunks. After each engine a
finding says how it ended, after each pair whether tokens and logprobs are the same, bit by bit
(scripts/gpu_findings.py).

vLLM logs at DEBUG: its graphs then check at every replay that their inputs lie where they lay at
capture. A CPU has no graphs; there engines are served by doubles of a GPU, one that plans and one for
which the host plans, and of Marlin's operators (tests/integration/simulated_*.py).
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.gpu_findings import note  # noqa: E402

BATCHES = (1, 3, 5)
CAPTURED = [1, 2, 4, 8, 128]
"""Rows of graphs: a batch of three or five is padded, and so is a chunk of a prompt."""


@dataclass(frozen=True, slots=True)
class Case:
    """A pair of engines.

    Attributes:
        arch: of scripts/demo_model.
        graphs: vLLM's ``cudagraph_mode``; None: without compilation and graphs.
        format: of scripts/quantize; None: bf16.
        quantization: vLLM's name of it.
    """

    name: str
    arch: str = "qwen3_moe"
    graphs: str | None = None
    format: str | None = None
    quantization: str | None = None

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
        Case("qwen3_moe, eager"),
        Case("qwen3_moe, FULL_AND_PIECEWISE", graphs="FULL_AND_PIECEWISE"),
        Case("deepseek_v3, eager", "deepseek_v3"),
        Case("deepseek_v3, FULL_AND_PIECEWISE", "deepseek_v3", "FULL_AND_PIECEWISE"),
        Case("qwen3_moe, PIECEWISE", graphs="PIECEWISE"),
        Case("qwen3_moe, FULL", graphs="FULL"),
        Case("deepseek_v3, PIECEWISE", "deepseek_v3", "PIECEWISE"),
        Case("deepseek_v3, FULL", "deepseek_v3", "FULL"),
        Case("int4", format="int4", quantization="compressed-tensors"),
        Case("fp8", format="fp8", quantization="fp8"),
    )
}
"""In order of worth."""
UNQUANTISED = [case.name for case in CASES.values() if case.format is None]


def write_model(case: Case, work_dir: Path) -> Path:
    """The case's model, new."""
    from scripts.demo_model import write_demo_model
    from scripts.demo_model.mtp import MTP_ARCHS, write_mtp_model
    from scripts.quantize import quantize

    plain = work_dir / f"model-{case.arch}"
    if case.arch in MTP_ARCHS:
        shutil.rmtree(plain, ignore_errors=True)
        return write_mtp_model(plain, case.arch, **case.shape)
    write_demo_model(plain, case.arch, force=True, **case.shape)
    if case.format is None:
        return plain
    quantised = work_dir / f"model-{case.format}"
    quantize(plain, quantised, case.format, force=True)
    return quantised


def job(
    case: Case, offload: Mapping[str, Any] | None, *, model: Path, device: str
) -> dict[str, Any]:
    """An engine for tests/integration/engine_driver.py."""
    from tests.integration.conftest import BATCH, engine, prompt

    on_cpu = device == "cpu"
    options: dict[str, Any] = {}
    if not on_cpu:
        options |= {
            "dtype": "bfloat16",
            "moe_backend": moe_backend(case.quantization),
            "gpu_memory_utilization": 0.5,
        }
        if case.graphs is not None:
            options["compilation_config"] = {
                "cudagraph_mode": case.graphs,
                "backend": "eager",  # Dynamo without Inductor: a start takes seconds
                "cudagraph_capture_sizes": CAPTURED,
            }
    simulated: dict[str, Any] = {}
    if on_cpu and offload is not None:
        # Host memory's share of the experts, or steps by which the routing is late.
        double = "simulated_device" if case.format is None else "simulated_gpu"
        simulated[double] = 1
    if on_cpu and case.format is not None:
        simulated["cpu_kernels"] = cpu_kernels()
        if offload is not None:
            offload = {**offload, "cpu_kernels": cpu_kernels()}
    if on_cpu and case.format == "int4":
        simulated["simulated_marlin"] = True
        options["moe_backend"] = "marlin"
    described: dict[str, Any] = engine(
        model,
        eager=case.graphs is None,
        offload=None if offload is None else dict(offload),
        **options,
    )
    batches = [[prompt(0, 300)], *(BATCH[:size] for size in BATCHES[1:])]
    return described | simulated | {"batches": batches}


def moe_backend(quantization: str | None) -> str:
    """The kernel that the plugin asks for on this GPU."""
    import torch

    from vllm_moe_offload.integration import formats

    backends: list[str] = formats.moe_backends(quantization, torch.cuda.get_device_capability())
    return backends[0]


def cpu_kernels() -> str:
    """The plugin's option for a rehearsal on this CPU."""
    from vllm_moe_offload.integration import cpu_kernels as kernels

    return "vllm" if kernels.has_amx() else "avx512"


def obstacle(case: Case, device: str) -> str | None:
    """Why a case cannot be rehearsed on this CPU."""
    if device == "cpu" and case.graphs is not None:
        return "a CPU has no CUDA graphs"
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
    return found | {"equal": same_tokens == same_logprobs == len(pairs)}


def without_inductor() -> None:
    """Logprobs are ranked by a function that vLLM compiles: let Dynamo alone do that.

    Inductor would need a compiler, and on a GPU half a minute of the step's time.
    """
    from vllm.platforms import current_platform

    type(current_platform).simple_compile_backend = "eager"


def main() -> int:
    """Exit status 0 if the tokens of all pairs are the same."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "DEBUG")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--work-dir", type=Path, required=True, help="of models and stores")
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=list(CASES),
        default=UNQUANTISED,
        metavar="CASE",
        help=f"of {'; '.join(CASES)} (default: those without a format)",
    )
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
