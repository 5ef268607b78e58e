"""``vllm-moe-offload plan``: what fits, how fast the link lets it be, the line to paste."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from vllm_moe_offload.cache.planner import CacheShape
from vllm_moe_offload.cli.command import Command, UsageError
from vllm_moe_offload.cli.plan_report import Report
from vllm_moe_offload.cli.sizes import parse_bandwidth, parse_memory
from vllm_moe_offload.plan.fit import RUN_MODEL_TYPES, Fit, fit
from vllm_moe_offload.plan.machine import NVME_GBPS, PCIE_GBPS, Machine
from vllm_moe_offload.plan.shapes import ModelShape, known_models, shape_of_config
from vllm_moe_offload.plan.shapes.kernel_form import place
from vllm_moe_offload.plan.shapes.known import find_known


@dataclass(frozen=True, slots=True)
class Model:
    """What MODEL stands for.

    Attributes:
        name: as shown.
        source: where its sizes are from.
        shape: its sizes.
        is_counted: whether they are from the weights' files.
        path: directory to serve.
        download: command that fetches it there; None if it is a local one.
        has_weights: whether they are there already.
    """

    name: str
    source: str
    shape: ModelShape
    is_counted: bool
    path: str
    download: str | None
    has_weights: bool


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="directory of a checkpoint, a config.json, or one of " + ", ".join(known_models()),
    )
    parser.add_argument(
        "--device-memory",
        metavar="SIZE",
        help="memory of the GPU, e.g. 24GiB; without it the plan is for a CPU server",
    )
    parser.add_argument(
        "--host-memory",
        metavar="SIZE",
        required=True,
        help="RAM of the server, e.g. 64GiB or 64GB; a number alone is GiB",
    )
    parser.add_argument(
        "--link-gbps",
        metavar="GB/S",
        help="1e9 bytes per second into fast memory: from the disk on a CPU server (default: "
        f"{NVME_GBPS:g}, an NVMe drive), from host memory on a GPU (default: {PCIE_GBPS:g}, "
        "PCIe 4 x16)",
    )
    parser.add_argument(
        "--disk-gbps",
        metavar="GB/S",
        help="of the disk, with a GPU, for experts that do not fit in host memory "
        f"(default: {NVME_GBPS:g})",
    )
    parser.add_argument(
        "--memory-gbps",
        metavar="GB/S",
        help="bandwidth of the fast memory; adds the time to read all weights that a token "
        "uses to the bound (default: left out)",
    )
    parser.add_argument(
        "--kv-tokens",
        metavar="N",
        type=int,
        help="tokens that the KV cache is to hold (default: a quarter of what weights leave, "
        "and what the experts leave)",
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures as JSON; - is stdout")


def _run(arguments: argparse.Namespace) -> int:
    machine = _machine(arguments)
    model = _find_model(arguments.model)
    if arguments.kv_tokens is not None and arguments.kv_tokens < 1:
        raise UsageError(f"--kv-tokens={arguments.kv_tokens}: must be 1 or more")
    result = fit(model.shape, machine, arguments.kv_tokens)
    commands = _commands(model, result)
    notes = _notes(model, result, arguments)
    report = Report(model.name, model.source, model.is_counted, result, commands, notes)
    document = json.dumps(report.as_dict(), indent=2)
    if arguments.json == "-":
        print(document)
    else:
        report.print(Console())
        if arguments.json:
            Path(arguments.json).write_text(document + "\n")
    return 1 if result.problems else 0


def _machine(arguments: argparse.Namespace) -> Machine:
    def bandwidth(option: str, default: float) -> float:
        text = getattr(arguments, option.removeprefix("--").replace("-", "_"))
        return default if text is None else parse_bandwidth(option, text)

    host_bytes = parse_memory("--host-memory", arguments.host_memory)
    memory = arguments.memory_gbps
    memory_gbps = None if memory is None else parse_bandwidth("--memory-gbps", memory)
    if arguments.device_memory is None:
        if arguments.disk_gbps is not None:
            raise UsageError(
                "--disk-gbps goes with --device-memory; on a CPU server the disk is the link: "
                "use --link-gbps"
            )
        link = bandwidth("--link-gbps", NVME_GBPS)
        return Machine(host_bytes, None, link, link, memory_gbps)
    return Machine(
        host_bytes,
        parse_memory("--device-memory", arguments.device_memory),
        bandwidth("--link-gbps", PCIE_GBPS),
        bandwidth("--disk-gbps", NVME_GBPS),
        memory_gbps,
    )


def _find_model(text: str) -> Model:
    path = Path(text).expanduser()
    if path.is_dir():
        return _local_checkpoint(path)
    if path.is_file():
        from vllm_moe_offload.plan.shapes.checkpoint import read_config

        shape = shape_of_config(read_config(path), str(path))
        return Model(text, str(path), shape, False, str(path.parent), None, False)
    known = find_known(text)
    if known is None:
        raise UsageError(
            f"MODEL={text}: neither a directory, nor a config.json, nor one of "
            f"{', '.join(known_models())}"
        )
    shape = shape_of_config(known.config, known.source)
    directory = known.model_id.rpartition("/")[2]
    copies = "*/*" if shape.model_type == "gpt_oss" else "*.pt"  # of all weights, for others
    download = f"hf download {known.model_id} --local-dir {directory} --exclude '{copies}'"
    return Model(known.name, known.source, shape, False, f"./{directory}", download, False)


def _local_checkpoint(path: Path) -> Model:
    from vllm_moe_offload.plan.shapes.checkpoint import (
        read_checkpoint,  # torch, which takes a while
    )

    found = read_checkpoint(path)
    if found.is_counted:
        source = f"headers of the safetensors files in {path}"
    else:
        source = str(path / "config.json")
    has_weights = found.file_bytes > 0
    return Model(str(path), source, found.shape, found.is_counted, str(path), None, has_weights)


def _commands(model: Model, result: Fit) -> list[str]:
    if result.problems:
        return []
    serve = shlex.join(["vllm", "serve", model.path, *result.serve_options()])
    return [serve] if model.download is None else [model.download, serve]


def _notes(model: Model, result: Fit, arguments: argparse.Namespace) -> list[str]:
    """What the figures assume, and what they do not say."""
    if result.cache is None:
        return []
    return [
        *_assumptions(model, result, arguments, result.cache),
        *_about_formats(model, result),
        *_what_has_not_run(model, result),
    ]


def _assumptions(
    model: Model, result: Fit, arguments: argparse.Namespace, cache: CacheShape
) -> Iterator[str]:
    machine, shape = result.machine, model.shape
    if arguments.link_gbps is None and not cache.holds_everything:
        kind = "PCIe 4 x16" if machine.has_gpu else "an NVMe drive"
        yield f"The link is assumed to be {kind}, {machine.link_gbps:g} GB/s."
    if result.host_share < 1 and machine.has_gpu:
        yield (
            f"Host memory holds {result.host_share:.0%} of the experts; the others are read from "
            f"the store on disk, at {machine.disk_gbps:g} GB/s."
        )
    has_spare_kv = arguments.kv_tokens is None and result.kv_tokens > shape.max_tokens
    if has_spare_kv and not cache.holds_everything:
        yield (
            f"The KV cache holds more than one request of {shape.max_tokens:,} tokens; a "
            "smaller --kv-tokens leaves more for experts."
        )
    if shape.extra_expert_layers:
        layers = ", ".join(map(str, shape.extra_expert_layers))
        yield f"Experts of layer {layers} (multi-token prediction) are left out: not served."
    if not result.is_exact:
        yield (
            f"Less than one layer's {shape.num_experts} experts fit: layers run in waves, and "
            "output equals plain vLLM's up to the rounding of a split sum."
        )
    if not model.has_weights and model.download is None:
        yield f"The weights must be in {model.path}, as safetensors files."


def _about_formats(model: Model, result: Fit) -> Iterator[str]:
    if not model.shape.is_quantized:
        return
    if not model.is_counted and result.format.kind != "mxfp4":  # which is for experts alone
        yield (
            "Dense weights are estimated: which of them are quantised is taken from config.json; "
            "a directory with the files is counted."
        )
    if not result.machine.has_gpu:
        yield (
            "vLLM's kernels for quantised experts ask for AMX. On a CPU without it, add "
            "--moe-offload-config.cpu_kernels avx512 (AVX-512 with BF16 and VNNI)."
        )
    elif result.format.kind == "fp8":
        yield (
            "On a GPU before compute capability 8.9 fp8 experts run on Marlin's kernel, whose "
            "scales add 1.5 % to an expert."
        )


def _what_has_not_run(model: Model, result: Fit) -> Iterator[str]:
    shape = model.shape
    if shape.model_type not in RUN_MODEL_TYPES:
        yield f"The plugin has not been run with {shape.model_type} models yet."
    if not result.has_run:
        where = place(result.machine.platform)
        yield f"{result.format.name} experts: not run on a {where} yet; bf16 ones were."


COMMAND = Command(
    ("plan",),
    "what fits, how many slots, the link's tokens/s, and the vllm serve line",
    _add_arguments,
    _run,
)
