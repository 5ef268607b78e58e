"""The steps of scripts/gpu_first.py: what each runs, for how long, and what it needs."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from scripts.engine_environment import engine_environment
from scripts.gpu_plan import SWEEP_SHARES

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
KIT_FILE = ROOT / "kit.json"
"""In a kit only (scripts/gpu_kit.py): names the commit that it was made from."""

TRITON_VARIABLE = "VMO_REHEARSAL_TRITON"
"""Environment variable with the folder of a Triton for the rehearsal; unset: there is none."""

Device = Literal["cuda", "cpu"]

RECORD_BYTES = 9_437_184
"""One expert of Qwen3-30B-A3B."""
HOST_TIER_GB = 20
"""Of the benchmark's model, in whole gigabytes: what is page-locked for it."""
BENCH_LAYERS = 16
MODEL, REHEARSED_MODEL = "qwen3-30b-a3b", "tiny-qwen3"
BENCH_MARGIN_S = 12.0
"""Between the benchmark's own limit and the step's."""
EVERYTHING_FITS_SHARE = 0.36
"""Of the bench step's time: two of its five contestants."""
BENCH_WORKLOADS = ("decode-1", "prefill-4096", "decode-8")
"""Short of time, the last one is the first to go."""
REHEARSED_WORKLOADS = ("decode-1", "prefill-512")
PROFILED = ("decode-1", "decode-1-any-topic")
HOST_PLANNED_TESTS = (
    "tests/gpu/test_torch_copier.py",
    "tests/gpu/test_triton_kernels.py",
    "tests/gpu/test_marlin_kernels.py",
)


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
        prepared: what steps after this one may need, done beside it; before it the GPU is timed.
    """

    name: str
    limit_s: float
    commands: Callable[[Run, float], list[Command]]
    obstacle: Callable[[Run], str | None] = lambda run: None
    prepared: Callable[[Run], Command] | None = None

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


def _kernels(run: Run, _: float) -> list[Command]:
    on_device = ("--device", run.device)
    sizes: tuple[object, ...] = ("--record-bytes", RECORD_BYTES, "--lock-gb", HOST_TIER_GB)
    calls: tuple[object, ...] = ()
    if run.device == "cpu":
        sizes = ("--record-bytes", 1 << 16, "--lock-gb", 0.25)
        calls = ("--least-calls", 8)
    return [
        Command("rule", _interpreted(run, _script("gpu_kernels.py", *on_device, *calls))),
        Command(
            "link", _interpreted(run, _script("gpu_link.py", *on_device, "--sweep", *sizes))
        ),
    ]


def _interpreted(run: Run, argv: tuple[str, ...]) -> tuple[str, ...]:
    """Without a GPU, with the Triton that the rehearsal lends to kernels alone: vLLM for CPUs would
    take it for a GPU's."""
    triton = os.environ.get(TRITON_VARIABLE)
    if run.device == "cuda" or not triton:
        return argv
    path = os.pathsep.join(filter(None, (*_module_folders(), triton)))
    return ("env", f"PYTHONPATH={path}", "TRITON_INTERPRET=1", *argv)


def _tokens(run: Run, _: float) -> list[Command]:
    arguments = ("--device", run.device, "--work-dir", run.work_dir / "tokens")
    return [Command("tokens", _script("gpu_tokens.py", *arguments))]


def _formats(run: Run, _: float) -> list[Command]:
    least = 1 if run.device == "cuda" else 0  # on a CPU they are collected and skipped
    argv, junit = _pytest(run, "formats", *HOST_PLANNED_TESTS)
    arguments = ("--device", run.device, "--work-dir", run.work_dir / "formats")
    return [
        Command("tests", argv, junit, least),
        Command("tokens", _script("gpu_tokens.py", *arguments, "--cases", "int4", "fp8")),
    ]


def no_kernels(run: Run) -> str | None:
    """Whether the kernels are known to do other things than the rule."""
    found = run.found("kernels", "rule")
    wrong = found is not None and not found.get("equal", True)
    return "the kernels do not follow the rule" if wrong else None


def no_tokens(run: Run) -> str | None:
    """Whether the plugin's tokens are not vLLM's even without graphs."""
    if run.record("tokens") is None:
        return None
    eager = run.found("tokens", "qwen3_moe, eager")
    return None if eager is not None and eager["equal"] else "eager tokens are not vLLM's"


def graphs_work(run: Run) -> bool:
    """Whether nothing is known against graphs."""
    found = run.found("tokens", "qwen3_moe, FULL_AND_PIECEWISE")
    return found is None or bool(found.get("equal", True))


def bench_arguments(run: Run, *shares: str) -> tuple[object, ...]:
    """Of scripts/bench_gpu.py and scripts/gpu_profile.py: on which parts of the model."""
    where = ("--device", run.device, "--work-dir", run.bench_dir / "bench")
    model = REHEARSED_MODEL if run.device == "cpu" else MODEL
    parts = ("--parts", *(f"{model}-{share}" for share in shares))
    if run.device == "cpu":
        return (*where, "--quick", *parts)
    return (*where, *parts, "--layers", BENCH_LAYERS)


def engine_arguments(run: Run) -> tuple[str, ...]:
    """Of the engines: all experts in host memory; vLLM's own graphs without Inductor, or none at all
    where graphs are wrong. A CPU has neither."""
    if run.device == "cpu":
        return ()
    graphs = ("--backend", "eager") if graphs_work(run) else ("--enforce-eager",)
    return ("--host-gb", "100%", *graphs)


def _bench(run: Run, limit_s: float) -> list[Command]:
    left_s = limit_s - BENCH_MARGIN_S
    fits_s = EVERYTHING_FITS_SHARE * left_s
    workloads = BENCH_WORKLOADS if run.device == "cuda" else REHEARSED_WORKLOADS
    common = ("--workloads", *workloads, "--results", run.results, *engine_arguments(run))
    contestants = ("--contestants", "resident", "trace", "cpu-offload-gb")
    return [
        Command(
            name,
            _script(
                "bench_gpu.py",
                *bench_arguments(run, share),
                *common,
                *contestants,
                *("--time-limit-s", limit),
            ),
        )
        for name, share, limit in (
            ("bench", "25", left_s - fits_s),
            ("everything fits", "100", fits_s),
        )
    ]


def _misses(run: Run, limit_s: float) -> list[Command]:
    shares = [f"{share}-misses" for share in SWEEP_SHARES]
    arguments = (
        *bench_arguments(run, *(shares if run.device == "cuda" else shares[:2])),
        *("--results", run.results, "--resident-once"),
        *("--total-limit-s", limit_s - BENCH_MARGIN_S),
        *engine_arguments(run),
    )
    return [Command("misses", _script("bench_gpu.py", *arguments))]


def _prepare(run: Run) -> Command:
    arguments = (*bench_arguments(run, "25"), "--prepare")
    return Command("prepare", _script("bench_gpu.py", *arguments))


def _profile(run: Run, _: float) -> list[Command]:
    arguments = (*bench_arguments(run, "25"), "--workloads", *PROFILED, *engine_arguments(run))
    return [Command("profile", _script("gpu_profile.py", *arguments))]


STEPS = {
    step.name: step
    for step in (
        Step("probe", 10, _probe),
        Step("kernels", 120, _kernels),
        Step("tokens", 180, _tokens, no_kernels, _prepare),
        Step("bench", 420, _bench, no_tokens),
        Step("misses", 360, _misses, no_tokens),
        Step("profile", 90, _profile, no_tokens),
        Step("formats", 120, _formats),
    )
}
"""In order of worth."""
NEED_MODEL = ("bench", "misses", "profile")
"""Steps for which :attr:`Step.prepared` is done."""
