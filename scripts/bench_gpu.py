"""Offloaders side by side on one GPU, with the same device memory; parts merge into gpu.json.

    python scripts/bench_gpu.py --list
    python scripts/bench_gpu.py --parts qwen3-30b-a3b-25 mixtral-8x7b-25
    python scripts/bench_gpu.py --parts qwen3-30b-a3b-25 --workloads decode-1 prefill-4096
    python scripts/bench_gpu.py --quick                  # tiny models: does everything work?
    python scripts/bench_gpu.py --device cpu --quick     # the harness alone, without a GPU

A part is a model and the share of its experts that lie on the device: 12.5, 25, 50 or 100 %.
Its contestants, each in a process of its own, one after the other, with the same KV cache:

    resident         vLLM with all experts on the device, Triton experts as in all others
    resident-auto    the same with the kernels that vLLM chooses itself (in the 100 % part)
    trace, lru       this plugin, experts in host memory, slots on the device
    cpu-offload-gb   vLLM's UVA offloader: experts beyond the share are read over the link
    vllm-prefetch    vLLM's prefetch offloader: whole layers are copied ahead

Parts named ...-misses ask what misses cost: resident and trace alone, with words of any topic, so
that what is needed changes at every step. --resident-once measures the link and resident in the first
part of a model and takes that for its other parts.

Models have the layers of Qwen3-30B-A3B and Mixtral-8x7B (hidden size, experts, widths, top-k),
fewer of them where disk and memory ask for it, and generated weights: routers are planted so
that requests keep to topics (scripts/demo_model), experts are random. Hit rates are
those models', not those of released weights; what a miss costs is real.

Greedy tokens are compared with the resident contestant's of the same part. The report is written
after each contestant: what was measured stays if the run is killed.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.engine_environment import (  # noqa: E402
    LOOPBACK,
    NO_COMPILER,
    OFFLINE,
    compiler_environment,
    engine_environment,
)
from scripts.gpu_figures import crossing_bytes  # noqa: E402
from scripts.gpu_models import ensure_model, store_of  # noqa: E402
from scripts.gpu_options import (  # noqa: E402
    Planned,
    add_plan_options,
    check_device,
    choices_of,
    planned,
)
from scripts.gpu_plan import (  # noqa: E402
    CONTESTANTS,
    PLUGIN,
    RESIDENT_AUTO,
    Part,
    Sizes,
    engine_options,
    offload_options,
)
from scripts.gpu_report import (  # noqa: E402
    load,
    save,
    show,
    where_and_what,
)
from scripts.harness.options import end_on_sigterm, results_of  # noqa: E402

GRACE_S = 20.0
"""What a contestant gets beyond its limit, to end by itself."""
LINK_LIMIT_S = 120
CPU_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "0"}

NOTES = (
    "Weights are generated. Routers, embeddings and attention are planted so that requests keep "
    "to topics; hit rates, and all that follows from them, are these models' and not those of "
    "released weights. Experts are random, cut from one block of noise per model.",
    "Hidden size, experts, expert width and top-k are the released model's. Layers may be fewer, "
    "the vocabulary is small, and attention heads are 64 wide (as many bytes of KV cache per "
    "token and layer): the resident step is shorter than the released model's, which makes the "
    "bars against it no easier.",
    "One engine per contestant, one after the other: clocks and temperature may drift between "
    "them. All but resident-auto use vLLM's Triton kernels for experts; the KV cache has the same "
    "size in all.",
    "cpu-offload-gb and vllm-prefetch are limited to parameters of experts, which is their best "
    "case: the rest of the model is used in every step.",
    "Prompts differ at every repeat and no prefix is cached. Hit rates are those of a server "
    "that has just started: trace begins each part without activation matrices.",
)


def run_contestant(
    part: Part,
    contestant: str,
    sizes: Sizes,
    args: argparse.Namespace,
    *,
    model_dir: Path,
    limit_s: float,
) -> dict[str, Any]:
    """One contestant from start to end; whatever happens is in what is returned."""
    options = engine_options(part, contestant, sizes, choices_of(args))
    if isinstance(options, str):
        return {"status": "not run", "reason": options}
    logs = args.work_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    offload = None
    if contestant in PLUGIN:
        offload = offload_options(
            part,
            contestant,
            store_of(args.work_dir, part.model),
            logs / f"gpu-{part.name}-{contestant}-{os.getpid()}.msgpack",
            args.host_gb,
        )
    spec_path, out, log = (
        logs / f"gpu-{part.name}-{contestant}.{kind}" for kind in ("spec.json", "jsonl", "log")
    )
    out.unlink(missing_ok=True)
    workloads = [asdict(workload) for workload in sizes.workloads]
    spec = {
        "model": str(model_dir),
        "engine": options,
        "offload": offload,
        "workloads": workloads,
        "limit_s": limit_s,
        "device": args.device,
    }
    spec_path.write_text(json.dumps(spec))
    environment = {
        **engine_environment(os.environ, args.work_dir / "caches"),
        **(CPU_ENVIRONMENT if args.device == "cpu" else {}),
        **compiler_environment(args.backend),
        "VLLM_CACHE_ROOT": str(args.work_dir.absolute() / "vllm-cache"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    began = time.perf_counter()
    status: int | str
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "gpu_contest.py"), spec_path, out],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            status = process.wait(limit_s + GRACE_S)
        except subprocess.TimeoutExpired:
            status = f"killed {GRACE_S:g} s after its time was over"
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    findings = (
        [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    )
    result = collect(findings, part.model.record_bytes)
    result |= {"options": {"engine": options, **({"offload": offload} if offload else {})}}
    result |= {"seconds": time.perf_counter() - began, "exit_status": status}
    if not result["ended"]:
        result["status"] = "failed"
        result["reason"] = f"exit status {status}"
        result["log_tail"] = log.read_text(errors="replace")[-4000:]
    return result


def collect(findings: Sequence[Mapping[str, Any]], record_bytes: int) -> dict[str, Any]:
    """A contestant's result from the lines that it wrote.

    ``status`` is ``measured`` if it came to its end, even if time was short: ``short`` then
    says of which workloads. ``warm_ups`` has, per workload, the repeats that do not count.
    """
    result: dict[str, Any] = {
        "status": "measured",
        "reason": "",
        "workloads": {},
        "warm_ups": {},
        "short": {},
        "ended": False,
    }
    for finding in findings:
        kind = finding["kind"]
        if kind == "ready":
            result["start_s"], result["memory_at_start"] = finding["start_s"], finding["memory"]
            result["counts_compilations"] = finding["counts_compilations"]
            result["way"] = finding.get("way")
        elif kind == "sample":
            sample = {**finding["sample"]}
            sample["crossing_bytes"] = crossing_bytes(sample, record_bytes)
            result["workloads"].setdefault(finding["workload"], []).append(sample)
        elif kind == "warm-up":
            result["warm_ups"].setdefault(finding["workload"], []).append(
                {name: finding[name] for name in ("repeat", "compiled")}
            )
        elif kind == "short":
            result["short"][finding["workload"]] = finding["measured"]
        elif kind == "memory":
            result["memory"] = finding["memory"]
        elif kind == "end":
            result["ended"] = True
    return result


def measure_link(part: Part, args: argparse.Namespace) -> dict[str, Any] | None:
    """Bandwidth to the device for records of the part's model; None without a device."""
    if args.device == "cpu":
        return None
    command = [sys.executable, str(ROOT / "scripts" / "gpu_link.py")]
    try:
        done = subprocess.run(
            [*command, "--record-bytes", str(part.model.record_bytes)],
            capture_output=True,
            text=True,
            check=False,
            timeout=LINK_LIMIT_S,
        )
    except subprocess.TimeoutExpired as error:  # the contestants can be measured without it
        print(f"The link could not be measured: {error}", file=sys.stderr)
        return {"error": f"not done within {LINK_LIMIT_S} s"}
    findings = [json.loads(line) for line in done.stdout.splitlines() if line[:1] == "{"]
    if not findings or "bytes_per_s" not in findings[-1]:
        print(f"The link could not be measured:\n{done.stderr[-2000:]}", file=sys.stderr)
        return {"error": done.stderr[-2000:]}
    found: dict[str, Any] = findings[-1]
    return found


def new_part(part: Part, sizes: Sizes, args: argparse.Namespace) -> dict[str, Any]:
    """A part's record before anything was measured."""
    return {
        "name": part.name,
        "model": part.model.to_json(),
        "share": part.share,
        "device": args.device,
        "parameters": {
            "workloads": [asdict(workload) for workload in sizes.workloads],
            "kv_cache_bytes": sizes.kv_cache_bytes,
            "chunk_tokens": sizes.chunk_tokens,
            "time_limit_s": args.time_limit_s,
            "total_limit_s": args.total_limit_s,
            **asdict(choices_of(args)),
            "environment": (
                OFFLINE | LOOPBACK | NO_COMPILER | compiler_environment(args.backend)
            ),
        },
        "notes": NOTES,
        "link": None,
        "contestants": {},
        **where_and_what(args.work_dir),
    }


@dataclass(frozen=True, slots=True)
class Allowed:
    """Time of a part.

    Attributes:
        limit_s: of all of it.
        num_later: contestants of later parts for which some of it has to be left.
    """

    limit_s: float
    num_later: int = 0


def run_part(
    part: Part,
    sizes: Sizes,
    args: argparse.Namespace,
    measured: dict[str, Any],
    *,
    allowed: Allowed,
    max_positions: int,
    first: Mapping[str, Any] | None,
    keep: Callable[[], object],
) -> None:
    """Measures all contestants of a part, as far as the time allows, into ``measured``.

    Args:
        part: which.
        sizes: with the workloads to run.
        args: of the command line.
        measured: see :func:`new_part`.
        allowed: time.
        max_positions: of the model's config, whatever the workloads.
        first: another part, whose link and resident contestant are this one's, too; None: they are
            measured here.
        keep: called after each contestant: what is in ``measured`` by then has to last.
    """
    began = time.perf_counter()
    chosen = chosen_of(part, args)
    contestants = measured["contestants"]
    for name in chosen:  # what is cut short says so
        contestants[name] = {"status": "not run", "reason": "the part ended before its turn"}
    model_dir = ensure_model(args.work_dir, part.model, max_positions)
    if first is None:
        measured["link"] = measure_link(part, args)
    else:
        measured["link"] = first["link"]
        if "resident" in chosen:
            chosen.remove("resident")
            measured_in = {"measured_in": first["name"]}
            contestants["resident"] = first["contestants"]["resident"] | measured_in
    for number, name in enumerate(chosen):
        left = allowed.limit_s - (time.perf_counter() - began)
        # What the first ones do not need is there for the others.
        limit = min(left - GRACE_S, 1.6 * left / (len(chosen) - number + allowed.num_later))
        if limit < args.least_s:
            contestants[name]["reason"] = "the part's time was over"
            continue
        print(f"{part.name}: {name}, at most {limit:.0f} s", flush=True)
        result = contestants[name] = run_contestant(
            part, name, sizes, args, model_dir=model_dir, limit_s=limit
        )
        print(
            f"{part.name}: {name}: {result['status']} {result['reason']}"
            f" ({time.perf_counter() - began:.0f} s of {allowed.limit_s:.0f} s)",
            flush=True,
        )
        keep()


def chosen_of(part: Part, args: argparse.Namespace) -> list[str]:
    """The part's contestants that were asked for, in order of importance."""
    return [name for name in part.contestants if name in args.contestants]


def is_complete(part: Mapping[str, Any]) -> bool:
    """Whether every contestant that can run here did, all workloads included."""
    return all(
        (contestant["status"] == "measured" and not contestant["short"])
        or contestant["reason"].startswith(("not on this platform", "not possible"))
        for contestant in part["contestants"].values()
    )


def run_parts(plan: Planned, args: argparse.Namespace, results: Path) -> bool:
    """All parts, one after the other; whether all that can run here was measured."""
    began = time.perf_counter()
    complete = True
    first_of: dict[str, dict[str, Any]] = {}
    for number, part in enumerate(plan.parts):
        sizes = plan.sizes_of(part)
        measured = new_part(part, sizes, args)
        keep = functools.partial(
            save, {"parts": {part.name: measured}}, results=results, work_dir=args.work_dir
        )
        try:
            run_part(
                part,
                sizes,
                args,
                measured,
                allowed=allowed_for(plan.parts[number + 1 :], args, began),
                max_positions=plan.max_positions,
                first=first_of.get(part.model.name),
                keep=functools.partial(keep, quiet=True),
            )
        finally:  # what was measured before an error or a signal is kept
            keep()
        resident = measured["contestants"].get("resident")
        if args.resident_once and resident and resident["status"] == "measured":
            first_of.setdefault(part.model.name, measured)
        complete = complete and is_complete(measured)
    return complete


def allowed_for(later: Sequence[Part], args: argparse.Namespace, began: float) -> Allowed:
    """Time of the next part, with ``later`` ones behind it; the first one began at ``began``."""
    if args.total_limit_s is None:
        return Allowed(args.time_limit_s)
    spared = {"resident"} if args.resident_once else set()
    num_later = sum(len(set(chosen_of(part, args)) - spared) for part in later)
    return Allowed(args.total_limit_s - (time.perf_counter() - began), num_later)


def main() -> int:
    """Exit status 1 if something that can run here was not measured; 2 for wrong arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="print the parts and end")
    parser.add_argument(
        "--prepare", action="store_true", help="write the parts' models and end"
    )
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=(*CONTESTANTS, RESIDENT_AUTO),
        default=[*CONTESTANTS, RESIDENT_AUTO],
    )
    parser.add_argument(
        "--time-limit-s", type=float, default=450, help="per part (default: %(default)s)"
    )
    parser.add_argument(
        "--total-limit-s", type=float, help="of all parts together: the last ones are cut short"
    )
    parser.add_argument(
        "--resident-once",
        action="store_true",
        help="measure link and resident in a model's first part, for its other parts as well",
    )
    parser.add_argument(
        "--least-s",
        type=float,
        default=30,
        help="no contestant is started with less time than this (default: %(default)s)",
    )
    add_plan_options(parser)
    args = parser.parse_args()
    try:
        plan = planned(args)
        if not (args.list or args.prepare):
            check_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        for part in plan.parts:
            print(
                f"{part.name}: {part.model.shape.layers} of {part.model.of_layers} layers, "
                f"{part.model.expert_bytes / 1e9:.1f} GB of experts; "
                f"{', '.join(part.contestants)}"
            )
        return 0
    if args.prepare:
        for model in dict.fromkeys(part.model for part in plan.parts):
            print(ensure_model(args.work_dir, model, plan.max_positions))
        return 0
    end_on_sigterm()
    results = results_of(args)
    if args.device == "cpu" and args.results is None:
        results = results_of(argparse.Namespace(results=None, quick=True))
    complete = run_parts(plan, args, results)
    show(load(results))
    return int(not complete)


if __name__ == "__main__":
    sys.exit(main())
