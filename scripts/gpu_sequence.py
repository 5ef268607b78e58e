"""The steps of scripts/gpu_first.py: what each runs, for how long, and what it needs."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from scripts.engine_environment import engine_environment

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
KIT_FILE = ROOT / "kit.json"
"""In a kit only (scripts/gpu_kit.py): names the commit that it was made from."""

Device = Literal["cuda", "cpu"]

RECORD_BYTES = 9_437_184
"""One expert of Qwen3-30B-A3B."""
BENCH_LAYERS = 8
BENCH_PART = "qwen3-30b-a3b-25"
REHEARSAL_PART = "tiny-qwen3-25"
BENCH_MARGIN_S = 12.0
"""Between the benchmark's own limit and the step's."""
COPIER_TESTS = "tests/gpu/test_copier.py"
KERNEL_TESTS = ("tests/gpu/test_triton_kernels.py", "tests/gpu/test_marlin_kernels.py")
SANITIZED = (
    f"{COPIER_TESTS}::test_every_byte_arrives_and_no_other_changes[23909-memcpy]",
    f"{COPIER_TESTS}::test_more_slots_than_one_launch_takes[gather]",
    f"{COPIER_TESTS}::test_kernels_wait_for_copies_that_were_joined[gather]",
)
"""Which copier tests run under compute-sanitizer: a copy engine, the kernel, order of both."""


@dataclass(frozen=True, slots=True)
class Command:
    """A process of a step.

    Attributes:
        junit: where pytest writes its report, for a command that is pytest.
        least_tests: how many must really have run.
    """

    name: str
    argv: tuple[str, ...]
    junit: Path | None = None
    least_tests: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """What all steps of a run have in common.

    Attributes:
        work_dir: models, stores, logs, and ``state``: the JSON of all steps so far.
        bench_dir: of the benchmark's model and store; memory is best.
        results: where reports go that a step writes itself.
    """

    device: Device
    work_dir: Path
    bench_dir: Path
    results: Path

    @property
    def state(self) -> Path:
        """Folder of the JSON of all steps so far, of earlier calls too."""
        return self.work_dir / "state"

    def record(self, step: str) -> dict[str, Any] | None:
        """JSON of a step, None if it never began."""
        path = self.state / f"{step}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def found(self, step: str, name: str) -> dict[str, Any] | None:
        """The last finding of a name in a step, None if there is none."""
        record = self.record(step)
        findings = record["findings"] if record else []
        return next((f for f in reversed(findings) if f["name"] == name), None)

    def passed(self, step: str, command: str) -> bool:
        """Whether a command of a step did, or the step never began.

        What never began holds nothing up: it may have been left out on purpose.
        """
        record = self.record(step)
        if record is None:
            return True
        return any(c["name"] == command and c["status"] == "passed" for c in record["commands"])


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the sequence.

    Attributes:
        commands: what it runs, one after the other, given the run and the seconds it has.
        obstacle: why it would be of no use after what happened so far; None: it is of use.
    """

    name: str
    limit_s: float
    commands: Callable[[Run, float], list[Command]]
    obstacle: Callable[[Run], str | None] = lambda run: None

    def with_limit(self, limit_s: float | None, scale: float = 1.0) -> Step:
        """The step with another limit, or its own times ``scale``."""
        return replace(self, limit_s=self.limit_s * scale if limit_s is None else limit_s)


def _module_folders() -> list[str]:
    """The kit's root; what the user gave; what the kit brings, where it is missing."""
    folders = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    if importlib.util.find_spec("pydantic") is None:
        folders.append(str(ROOT / "site"))
    return folders


def environment(run: Run) -> dict[str, str]:
    """Of every process: everything local, nothing from or to anywhere else."""
    found = {
        **engine_environment(os.environ, run.work_dir / "caches"),
        "PYTHONPATH": os.pathsep.join(filter(None, _module_folders())),
        "PYTHONUNBUFFERED": "1",
        "VLLM_CACHE_ROOT": str(run.work_dir / "vllm-cache"),
    }
    if run.device == "cpu":
        found |= {"VLLM_CPU_OMP_THREADS_BIND": "0", "VLLM_CPU_CI_ENV": "1"}
    return found


def _script(name: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, str(SCRIPTS / name), *map(str, arguments))


def _pytest(run: Run, name: str, *arguments: str) -> tuple[tuple[str, ...], Path]:
    """Command line of pytest, and its report."""
    junit = run.work_dir / f"{name}.xml"
    junit.unlink(missing_ok=True)
    temporary = run.work_dir / f"{name}-tmp"
    options = ("-q", "-p", "no:cacheprovider", f"--basetemp={temporary}", f"--junitxml={junit}")
    return (sys.executable, "-m", "pytest", *options, *arguments), junit


def _probe(run: Run, _: float) -> list[Command]:
    touch = () if run.device == "cuda" else ("--touch-gb", 0.5)
    return [Command("probe", _script("gpu_probe.py", *touch))]


def _copies(run: Run, _: float) -> list[Command]:
    least = 1 if run.device == "cuda" else 0  # on a CPU they are collected and skipped
    argv, junit = _pytest(run, "copies", COPIER_TESTS)
    commands = [Command("tests", argv, junit, least)]
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        return commands
    argv, junit = _pytest(run, "sanitized", *SANITIZED)
    # torch's caching allocator would hide accesses beyond a tensor.
    uncached = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1")
    memcheck = (sanitizer, "--tool", "memcheck", "--error-exitcode", "86")
    commands.append(Command("memcheck", (*uncached, *memcheck, *argv), junit, len(SANITIZED)))
    return commands


def _link(run: Run, _: float) -> list[Command]:
    sizes: tuple[object, ...] = ("--record-bytes", RECORD_BYTES, "--lock-gb", 20)
    if run.device == "cpu":
        sizes = ("--record-bytes", 1 << 16, "--lock-gb", 0.25, "--round-bytes", 1 << 22)
    return [
        Command(
            "link",
            _script("gpu_link.py", "--device", run.device, *sizes),
        )
    ]


def _tokens(run: Run, _: float) -> list[Command]:
    arguments = ("--device", run.device, "--work-dir", run.work_dir / "tokens")
    return [Command("tokens", _script("gpu_tokens.py", *arguments))]


def _formats(run: Run, _: float) -> list[Command]:
    arguments = ("--device", run.device, "--work-dir", run.work_dir / "formats")
    return [Command("tokens", _script("gpu_tokens.py", *arguments, "--cases", "int4", "fp8"))]


def no_copies(run: Run) -> str | None:
    """Whether nothing that copies experts can work."""
    return None if run.passed("copies", "tests") else "the copier's tests did not pass"


def no_tokens(run: Run) -> str | None:
    """Whether the plugin's tokens are not vLLM's even without graphs."""
    if run.record("tokens") is None:
        return None
    eager = run.found("tokens", "eager")
    return None if eager is not None and eager["equal"] else "eager tokens are not vLLM's"


def graphs_work(run: Run) -> bool:
    """Whether nothing is known against graphs."""
    if run.record("tokens") is None:
        return True
    graphs = run.found("tokens", "graphs")
    return graphs is not None and bool(graphs["equal"])


def _kernels(run: Run, _: float) -> list[Command]:
    least = 1 if run.device == "cuda" else 0
    argv, junit = _pytest(run, "kernels", *KERNEL_TESTS)
    return [Command("tests", argv, junit, least)]


def bench_arguments(run: Run) -> tuple[object, ...]:
    """Of scripts/bench_gpu.py, for the benchmark and the profile alike."""
    where = ("--device", run.device, "--work-dir", run.bench_dir / "bench")
    if run.device == "cpu":
        return (*where, "--quick", "--parts", REHEARSAL_PART)
    return (*where, "--parts", BENCH_PART, "--layers", BENCH_LAYERS)


def compilation(run: Run) -> tuple[str, ...]:
    """How engines compile: not at all where graphs are wrong, else without Inductor."""
    return ("--backend", "eager") if graphs_work(run) else ("--enforce-eager",)


def _bench(run: Run, limit_s: float) -> list[Command]:
    arguments = [*bench_arguments(run), "--results", run.results]
    arguments += ["--time-limit-s", limit_s - BENCH_MARGIN_S]
    if run.device == "cpu":
        arguments += ["--workloads", "decode-1", "prefill-512", "--contestants", "trace", "lru"]
    else:
        arguments += [
            "--host-gb",
            "100%",
            "--workloads",
            "decode-1",
            "decode-8",
            "prefill-4096",
        ]
    arguments += compilation(run)
    return [Command("bench", _script("bench_gpu.py", *arguments))]


def _profile(run: Run, _: float) -> list[Command]:
    arguments = [*bench_arguments(run), "--workloads", "decode-1"]
    if run.device == "cuda":  # the simulated device's way is not one that Dynamo could follow
        arguments += ["--host-gb", "100%", *compilation(run)]
    return [Command("profile", _script("gpu_profile.py", *arguments))]


STEPS = {
    step.name: step
    for step in (
        Step("probe", 10, _probe),
        Step("copies", 60, _copies),
        Step("link", 40, _link),
        Step("tokens", 160, _tokens, no_copies),
        Step("kernels", 60, _kernels),
        Step("formats", 120, _formats, no_copies),
        Step("bench", 300, _bench, no_tokens),
        Step("profile", 60, _profile, no_tokens),
    )
}
"""In order of worth."""
