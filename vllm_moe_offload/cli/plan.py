"""``vllm-moe-offload plan``: what fits, how fast the link lets it be, the line to paste."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from rich.console import Console

from vllm_moe_offload.cli.command import Command, UsageError
from vllm_moe_offload.cli.plan_model import Model, find_model
from vllm_moe_offload.cli.plan_notes import notes, rank_notes
from vllm_moe_offload.cli.plan_ranks import RankReport
from vllm_moe_offload.cli.plan_report import Report
from vllm_moe_offload.cli.sizes import parse_bandwidth, parse_memory
from vllm_moe_offload.plan.cluster import ClusterFit, fit_cluster
from vllm_moe_offload.plan.fit import Fit, fit
from vllm_moe_offload.plan.machine import NVME_GBPS, PCIE_GBPS, Machine
from vllm_moe_offload.plan.shapes import known_models
from vllm_moe_offload.plan.split import Split, misfits


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
    parser.add_argument(
        "--nodes",
        metavar="N",
        type=int,
        default=1,
        help="machines like that, each with as many of the ranks (default: 1)",
    )
    parser.add_argument(
        "--tensor-parallel-size",
        "-tp",
        metavar="N",
        type=int,
        default=1,
        help="ranks that share each layer, as for vllm serve (default: 1)",
    )
    parser.add_argument(
        "--pipeline-parallel-size",
        "-pp",
        metavar="N",
        type=int,
        default=1,
        help="groups of ranks that share the layers, as for vllm serve (default: 1)",
    )
    parser.add_argument(
        "--expert-parallel",
        "--enable-expert-parallel",
        action="store_true",
        help="ranks that share a layer hold whole experts of it, not a slice of each",
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures as JSON; - is stdout")


def _run(arguments: argparse.Namespace) -> int:
    machine, split = _machine(arguments), _split(arguments)
    model = find_model(arguments.model)
    if arguments.kv_tokens is not None:
        _at_least_one("--kv-tokens", arguments.kv_tokens)
    for misfit in misfits(split, model.shape):
        raise UsageError(misfit)
    report = _report(model, machine, split, arguments)
    document = json.dumps(report.as_dict(), indent=2)
    if arguments.json == "-":
        print(document)
    else:
        report.print(Console())
        if arguments.json:
            Path(arguments.json).write_text(document + "\n")
    return 1 if report.problems else 0


def _report(
    model: Model, machine: Machine, split: Split, arguments: argparse.Namespace
) -> Report | RankReport:
    result = fit(model.shape, machine, arguments.kv_tokens)
    given = {
        "has_link": arguments.link_gbps is not None,
        "has_kv_tokens": arguments.kv_tokens is not None,
    }
    if split == Split():
        about = notes(model, result, **given)
        commands = _commands(model, result)
        return Report(model.name, model.source, model.is_counted, result, commands, about)
    cluster = fit_cluster(model.shape, machine, split, arguments.kv_tokens)
    about = [*notes(model, cluster.tightest.fit, **given), *rank_notes(cluster)]
    commands = _commands(model, cluster)
    return RankReport(
        model.name, model.source, model.is_counted, result, cluster, commands, about
    )


def _split(arguments: argparse.Namespace) -> Split:
    for option in ("--nodes", "--tensor-parallel-size", "--pipeline-parallel-size"):
        _at_least_one(option, getattr(arguments, option.removeprefix("--").replace("-", "_")))
    return Split(
        arguments.nodes,
        arguments.tensor_parallel_size,
        arguments.pipeline_parallel_size,
        arguments.expert_parallel,
    )


def _at_least_one(option: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"{option}={value}: must be 1 or more")


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


def _commands(model: Model, result: Fit | ClusterFit) -> list[str]:
    if result.problems:
        return []
    serve = shlex.join(["vllm", "serve", model.path, *result.serve_options()])
    return [serve] if model.download is None else [model.download, serve]


COMMAND = Command(
    ("plan",),
    "what fits, how many slots, the link's tokens/s, and the vllm serve line",
    _add_arguments,
    _run,
)
