"""Runs vLLM engines in a process of their own and writes what they generated.

Usage: engine_driver.py JOBS.json OUT.json
       engine_driver.py

Without arguments it reads lines ``["JOBS.json", "OUT.json"]`` from standard input and answers each
with the line ``done``, so that one process, which takes long to import vLLM, serves many lists.

JOBS is a list of engines, run one after the other: ``{"llm": kwargs of vllm.LLM,
"batches": [[prompt token ids, ...], ...], "max_tokens": n}``, and with ``"embedded"`` values that
come before the batches in prompts of embeddings. OUT gets, per engine, per batch
and per prompt, the generated ids and for every generated token the top logprobs as exact
hexadecimal floats; facts about the engine's layers and counters, unless the job says
``"facts": false`` (workers in processes of their own cannot be asked for them); and, if the
engine has ``"disable_log_stats": false``, the plugin's part of ``LLM.get_metrics()``; if it
speculates, how much it drafted and how much of that was accepted; and with a worker extension,
which is one of :mod:`tests.integration.worker_probe`, what its workers say. An engine with
``"overwrite": byte`` has its store filled with that byte between its start and the first batch.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest


def replace_kernels_once() -> None:
    """Lets vLLM's platform replace Triton's kernels for the first engine only.

    Every CPU worker looks for them in all modules of its process, and stumbles over one of
    Numba's, which an engine before it has loaded to draft n-grams. They are replaced by then.
    """
    from vllm.platforms import current_platform

    once = functools.cache(current_platform.register_triton_kernel_overrides)
    current_platform.register_triton_kernel_overrides = once


def generate(
    llm: LLM, prompts: list[list[int]], max_tokens: int, adapter: str | None = None
) -> list[dict[str, Any]]:
    """Greedy generation of all prompts submitted at once, by a LoRA adapter if one is given."""
    parameters = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, logprobs=5, ignore_eos=True
    )
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        parameters,
        use_tqdm=False,
        lora_request=None if adapter is None else LoRARequest("adapter", 1, adapter),
    )
    return [
        {
            "ids": list(output.outputs[0].token_ids),
            "logprobs": [
                {str(token): value.logprob.hex() for token, value in position.items()}
                for position in output.outputs[0].logprobs
            ],
        }
        for output in outputs
    ]


def generate_from(llm: LLM, values: list[str], max_tokens: int) -> None:
    """One request after the other, of embeddings of which the last is one of these values, such as
    ``"nan"``, all along. What comes of them is not looked at."""
    shape = (8, llm.llm_engine.model_config.get_hidden_size())
    parameters = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    for value in values:
        embeds = torch.full(shape, 0.01, dtype=llm.llm_engine.model_config.dtype)
        embeds[-1] = float(value)
        llm.generate({"prompt_embeds": embeds}, parameters, use_tqdm=False)


def facts(llm: LLM) -> dict[str, Any]:
    """Classes of the expert layers and, with offload, what the runtime counted: of the first worker,
    and under ``ranks`` of each."""

    from tests.integration.engine_facts import inspect

    ranks = llm.apply_model(inspect)
    return {**ranks[0], "ranks": ranks}


def metrics(llm: LLM) -> dict[str, Any]:
    """The plugin's part of what ``LLM.get_metrics`` says of this engine, of the last rank and of
    each; and the names of the files that it comes from. Engines of other models that this process
    had before are on it as well."""
    from vllm_moe_offload.integration.counters_dir import counters_dir

    directory = counters_dir()
    served = llm.llm_engine.model_config.served_model_name
    by_rank: dict[str, dict[str, float]] = {}
    for metric in llm.get_metrics():
        name = metric.labels.get("model_name")
        if metric.name.startswith("vllm:moe_offload_") and name == served:
            of_rank = by_rank.setdefault(metric.labels["rank"], {})
            of_rank[metric.name.removeprefix("vllm:moe_offload_")] = metric.value
    return {
        "metrics": list(by_rank.values())[-1],
        "metrics_by_rank": by_rank,
        "counter_files": sorted(path.name for path in directory.iterdir()) if directory else [],
    }


def speculation(llm: LLM) -> dict[str, int]:
    """What vLLM counted of speculation: ``drafts`` (one for each request and step that had
    any), ``draft_tokens`` and, of these, ``accepted_tokens``."""
    names = ("drafts", "draft_tokens", "accepted_tokens")
    counted = dict.fromkeys(names, 0)
    for metric in llm.get_metrics():
        name = metric.name.removeprefix("vllm:spec_decode_num_")
        if name in counted:
            counted[name] += int(metric.value)
    return counted


def overwrite_store(offload: dict[str, Any], byte: int) -> None:
    """Fills the files of all experts with ``byte``, where they lie: servers have them open."""
    for path in Path(offload["store_dir"]).glob("*/*/experts.bin"):
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.write(bytes([byte]) * size)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One engine: start, all batches, stop."""
    began = time.perf_counter()
    options = job["llm"]
    speculates = "speculative_config" in options
    try:
        # Without statistics vLLM does not count what was accepted.
        llm = LLM(**({"disable_log_stats": False} if speculates else {}) | options)
    except Exception as error:  # noqa: BLE001 (the test asserts on what was raised)
        return {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    started = time.perf_counter()
    result: dict[str, Any] = {"start_seconds": started - began}
    if "overwrite" in job:
        overwrite_store(options["additional_config"]["moe_offload"], job["overwrite"])
    try:
        generate_from(llm, job.get("embedded", []), job["max_tokens"])
        result["batches"] = [
            generate(llm, batch, job["max_tokens"], job.get("adapter"))
            for batch in job["batches"]
        ]
        if job.get("facts", True):
            result["facts"] = facts(llm)
        if not options.get("disable_log_stats", True):
            result |= metrics(llm)
        if speculates:
            result["speculation"] = speculation(llm)
        if "worker_extension_cls" in options:
            result["truth"] = llm.collective_rpc("moe_offload_truth")
    except Exception as error:  # noqa: BLE001 (as above)
        result |= {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    result["run_seconds"] = time.perf_counter() - started
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return result


@contextlib.contextmanager
def _machine(job: dict[str, Any]) -> Iterator[None]:
    """What the engine believes to run on.

    ``"simulated_gpu"``: host memory's share of experts; ``"simulated_device"``: a device that plans,
    whose copies are late by so many steps; ``"simulated_marlin"``: doubles of the
    operators of Marlin's experts, for a plain engine too; ``"lora_on_cpu"``: LoRA beside experts,
    likewise; ``"torchvision_double"``: that torchvision is installed.
    """
    with contextlib.ExitStack() as stack:
        if "simulated_gpu" in job:
            from tests.integration.simulated_gpu import simulated_gpu

            stack.enter_context(simulated_gpu(job["simulated_gpu"]))
        if "simulated_device" in job:
            from tests.integration.simulated_device import simulated_device

            stack.enter_context(simulated_device(job["simulated_device"]))
        if job.get("simulated_marlin"):
            from tests.integration.simulated_marlin import simulated_marlin

            stack.enter_context(simulated_marlin())
        if job.get("lora_on_cpu"):
            from tests.integration.lora_on_cpu import lora_on_cpu

            stack.enter_context(lora_on_cpu())
        if job.get("torchvision_double"):
            from tests.integration.torchvision_double import torchvision_double

            stack.enter_context(torchvision_double())
        yield


@contextlib.contextmanager
def _cpu(job: dict[str, Any]) -> Iterator[None]:
    """Kernels for quantised weights: ``"cpu_kernels"``, for a plain engine too, and
    ``"without_amx"``, on a CPU that denies having it."""
    import torch

    from vllm_moe_offload.integration import cpu_kernels

    if job.get("cpu_kernels") == "avx512":
        cpu_kernels.install()
    amx = torch.cpu._is_amx_tile_supported
    if job.get("without_amx"):
        torch.cpu._is_amx_tile_supported = lambda: False
    try:
        yield
    finally:
        torch.cpu._is_amx_tile_supported = amx


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """One engine on the machine that it is to believe in."""
    with _machine(job), _cpu(job):
        return run(job)


def run_jobs(jobs: Path, out: Path) -> None:
    """All engines of a list; what is done so far is in ``out``, whatever happens later."""
    results = []
    for job in json.loads(jobs.read_text()):
        results.append(run_job(job))
        out.write_text(json.dumps(results))


def serve() -> None:
    """Lists of engines from standard input, until it is closed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines print, too
    for line in sys.stdin:
        jobs, out = json.loads(line)
        run_jobs(Path(jobs), Path(out))
        print("done", file=answers, flush=True)


def main() -> None:
    """See the module's docstring."""
    replace_kernels_once()
    if len(sys.argv) == 1:
        serve()
    else:
        run_jobs(Path(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
