"""Half an hour on a CUDA machine: seven steps, in order of worth, each with its limit.

    python scripts/gpu_first.py --results DIR                        all steps
    python scripts/gpu_first.py --results DIR --only probe kernels   some of them
    python scripts/gpu_first.py --results DIR --from tokens          this one and those after it
    python scripts/gpu_first.py --results DIR --limit-total 900      as far as 900 seconds reach
    python scripts/gpu_first.py --rehearse                           all of it, on a CPU

    probe    driver, memory, compilers, disks
    kernels  our kernels alone, without vLLM: do they follow the rule, how long do they plan, how
             fast do they copy; how long does page-locking take
    tokens   tiny models: is what the plugin says what plain vLLM says, without graphs and with
    bench    a quarter of the experts on the device, and all of them, beside vLLM's own ways
    misses   from an eighth of the experts to all but one, where every step needs others
    profile  what runs on the device in a decode step of `trace`, and our part of the host's time
    formats  what the host plans: copies by torch's streams, quantised experts

Needs no network, no git, no nvcc and no clone: only what `make gpu-kit` packs, torch with its Triton
and the C compiler that Triton asks for, and, from tokens on, vLLM on PYTHONPATH. While tokens runs,
the model of the steps behind it is written. DIR/<step>.json is written when a step begins, whenever
it found something, and when it ends; the same files under --work-dir tell later calls how earlier
steps went. A step that hangs is killed at its limit. One that failed ends the steps that need it, and
no others. With --limit-total the last steps fall away; within bench and misses what is worth least.

--rehearse unpacks the packed kit into an empty folder and runs the sequence there on a CPU, with a
simulated device, tiny sizes, and a PATH of python and coreutils alone. It fails if a step failed, or
looked at the clone, the network, git or a compiler (scripts/rehearsal/sitecustomize.py).

Exit status: 0 all steps passed; 1 one did not; 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts import gpu_findings  # noqa: E402
from scripts.gpu_probe import memory  # noqa: E402
from scripts.gpu_sequence import (  # noqa: E402
    KIT_FILE,
    NEED_MODEL,
    STEPS,
    Command,
    Run,
    Step,
    environment,
)
from scripts.harness.machine import commit, hardware, versions  # noqa: E402

LOG_TAIL_CHARACTERS = 6000
KILL_GRACE_S = 2.0
"""Of a step's limit: between the request to end and the kill."""
POLL_S = 0.2
LEAST_STEP_S = 8.0
"""No step is begun with less time than this."""
BESIDE_LIMIT_S = 180.0
"""Of what is prepared beside a step, once that has ended."""


# ---- one command -----------------------------------------------------------------------


def run_command(
    command: Command,
    *,
    log: Path,
    env: Mapping[str, str],
    deadline: float,
    poll: Callable[[], object],
) -> dict[str, Any]:
    """Runs a command in a process group of its own until ``deadline`` (``time.monotonic()``).

    ``poll`` is called again and again meanwhile. What is returned has ``status``: ``passed``,
    ``failed`` or ``timed out``.
    """
    began = time.monotonic()
    with log.open("a") as file:
        print(f"$ {command.name}: {' '.join(command.argv)}", file=file, flush=True)
        try:
            process = subprocess.Popen(
                command.argv,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=dict(env),
                cwd=ROOT,
                start_new_session=True,
            )
        except OSError as error:
            return {"name": command.name, "status": "failed", "reason": str(error)}
        hung = False
        try:
            while process.poll() is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    hung = True
                    break
                if left <= KILL_GRACE_S:
                    _signal_group(process.pid, signal.SIGTERM)
                time.sleep(min(POLL_S, left))
                poll()
        finally:
            _signal_group(process.pid, signal.SIGKILL)  # and whatever it left behind
            status = process.wait()
    result: dict[str, Any] = {
        "name": command.name,
        "status": "passed" if status == 0 else "failed",
        "exit_status": status,
        "seconds": round(time.monotonic() - began, 2),
    }
    if hung or (status < 0 and time.monotonic() > deadline - KILL_GRACE_S):
        result |= {"status": "timed out", "reason": "the step's limit was over"}
    if command.junit is not None:
        result |= _with_tests(result, command)
    return result


def _signal_group(leader: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of it ended
        os.killpg(leader, number)


def _with_tests(result: Mapping[str, Any], command: Command) -> dict[str, Any]:
    """What pytest counted; a run in which nothing was tested did not pass."""
    assert command.junit is not None
    if not command.junit.exists():
        return {"tests": None}
    suite = next(ET.parse(command.junit).iter("testsuite"))
    tests = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = {
        f"{case.get('classname')}::{case.get('name')}": (case[0].get("message") or "")[:500]
        for case in suite.iter("testcase")
        if any(part.tag in ("failure", "error") for part in case)
    }
    found: dict[str, Any] = {"tests": tests, "failed_tests": failed}
    ran = tests["tests"] - tests["skipped"]
    if result["status"] == "passed" and (tests["tests"] == 0 or ran < command.least_tests):
        found |= {"status": "failed", "reason": f"{ran} tests ran of {tests['tests']}"}
    return found


# ---- one step --------------------------------------------------------------------------


class Record:
    """The JSON of one step, here and in the state that later calls read."""

    def __init__(self, step: Step, run: Run, results: Path) -> None:
        self._paths = [folder / f"{step.name}.json" for folder in (results, run.state)]
        self.data: dict[str, Any] = {
            "step": step.name,
            "status": "running",
            "reason": "",
            "device": run.device,
            "limit_s": step.limit_s,
            "seconds": None,
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "hardware": hardware(run.work_dir),
            "versions": versions(),
            "git": commit(),
            "commands": [],
            "findings": [],
            "log_tail": "",
        }

    def write(self, **changes: Any) -> None:
        """Changes fields; files are replaced whole."""
        self.data |= changes
        text = json.dumps(self.data, indent=1, default=str).replace(f"{ROOT}/", "")
        for path in self._paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_text(text + "\n")
            part.rename(path)


def run_step(step: Step, run: Run, results: Path) -> dict[str, Any]:
    """One step to its end or its limit; returns what its JSON holds."""
    record = Record(step, run, results)
    obstacle = step.obstacle(run)
    if obstacle is not None:
        record.write(status="not run", reason=obstacle, seconds=0.0)
        return record.data
    record.write()
    log, findings = (run.work_dir / f"{step.name}.{kind}" for kind in ("log", "findings"))
    for path in (log, findings):
        path.unlink(missing_ok=True)
    began = time.monotonic()
    deadline = began + step.limit_s
    seen = 0

    def poll() -> None:
        nonlocal seen
        if findings.exists() and findings.stat().st_size != seen:
            seen = findings.stat().st_size
            record.write(findings=gpu_findings.read(findings))

    env = environment(run) | {gpu_findings.VARIABLE: str(findings)}
    done: list[dict[str, Any]] = []
    for command in step.commands(run, deadline - time.monotonic()):
        result = run_command(command, log=log, env=env, deadline=deadline, poll=poll)
        done.append(result)
        record.write(commands=done)
    bad = [command for command in done if command["status"] != "passed"]
    record.write(
        status=bad[0]["status"] if bad else "passed",
        reason="; ".join(f"{c['name']}: {c.get('reason') or c['status']}" for c in bad),
        seconds=round(time.monotonic() - began, 2),
        findings=gpu_findings.read(findings),
        log_tail=log.read_text(errors="replace")[-LOG_TAIL_CHARACTERS:],
    )
    return record.data


def run_steps(
    steps: Sequence[Step], run: Run, results: Path, total_s: float = math.inf
) -> bool:
    """All steps, one after the other, in ``total_s`` seconds; whether all passed."""
    passed = True
    deadline = time.monotonic() + total_s
    for number, whole in enumerate(steps):
        step = within(whole, deadline - time.monotonic())
        print(f"=== {step.name}: at most {step.limit_s:g} s", flush=True)
        is_needed = any(later.name in NEED_MODEL for later in steps[number + 1 :])
        with beside(step.prepared(run) if step.prepared and is_needed else None, run):
            record = run_step(step, run, results)
        told = f" ({record['reason']})" if record["reason"] else ""
        print(f"=== {step.name}: {record['status']}{told}, {record['seconds']} s", flush=True)
        if record["status"] != "passed":
            print(record["log_tail"][-1500:], flush=True)
        passed = passed and record["status"] == "passed"
    return passed


def within(step: Step, left_s: float) -> Step:
    """The step in the time that is left for it and those after it."""
    if left_s < LEAST_STEP_S:
        return replace(step, obstacle=lambda _: "the time of all steps was over")
    return step.with_limit(min(step.limit_s, round(left_s, 1)))


@contextlib.contextmanager
def beside(command: Command | None, run: Run) -> Iterator[None]:
    """Runs a command meanwhile, to its end or its limit.

    If it fails, whoever needs what it was to make does that again and says why it cannot.
    """
    if command is None:
        yield
        return
    with (run.work_dir / f"{command.name}.log").open("w") as log:
        process = subprocess.Popen(
            command.argv,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment(run),
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            yield
            with contextlib.suppress(subprocess.TimeoutExpired):  # killed below
                process.wait(BESIDE_LIMIT_S)
        finally:
            _signal_group(process.pid, signal.SIGKILL)
            status = process.wait()
    print(f"=== {command.name}, meanwhile: status {status}; {log.name}", flush=True)


# ---- the command line ------------------------------------------------------------------


def chosen_steps(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Step]:
    """Steps that were asked for, in their order, with their limits."""
    limits: dict[str, float] = {}
    for text in args.limit:
        name, _, seconds = text.partition("=")
        if name not in STEPS or not seconds.replace(".", "", 1).isdigit():
            parser.error(f"--limit {text}: allowed is STEP=SECONDS, STEP of {', '.join(STEPS)}")
        limits[name] = float(seconds)
    names = list(STEPS)
    if args.begin is not None:
        names = names[names.index(args.begin) :]
    if args.only:
        names = [name for name in names if name in args.only]
    scale = 1.0 if args.device == "cuda" else CPU_LIMIT_FACTOR
    return [STEPS[name].with_limit(limits.get(name), scale) for name in names]


CPU_LIMIT_FACTOR = 6.0
"""Two busy cores are slower than what the limits are for."""
BENCH_DISK_BYTES = 41_000_000_000
"""The benchmark's checkpoint and store."""
BENCH_MEMORY_BYTES = 62_000_000_000
"""With both in memory: these, as many experts page-locked, and engines."""


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, help="folder of the steps' JSON")
    parser.add_argument("--from", dest="begin", choices=STEPS, metavar="STEP")
    parser.add_argument("--only", nargs="+", choices=STEPS, metavar="STEP")
    parser.add_argument("--limit", action="append", default=[], metavar="STEP=SECONDS")
    parser.add_argument(
        "--limit-total", type=float, default=math.inf, metavar="SECONDS", help="of all steps"
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        help="models, stores, logs and state (default: gpu-first in the temporary folder)",
    )
    parser.add_argument(
        "--bench-dir",
        type=Path,
        help="of the benchmark's model and store (default: in memory, else --work-dir)",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--kit", type=Path, help="packed kit to rehearse with")
    args = parser.parse_args()
    if args.rehearse:
        from scripts.gpu_rehearsal import rehearse

        return rehearse(args.kit, args.results)
    if args.results is None:
        parser.error("--results is needed: the folder of the steps' JSON")
    steps = chosen_steps(args, parser)
    work_dir = (args.work_dir or Path(tempfile.gettempdir()) / "gpu-first").absolute()
    work_dir.mkdir(parents=True, exist_ok=True)
    results = args.results.absolute()
    bench_dir = args.bench_dir or roomiest(args.device, work_dir)
    if KIT_FILE.exists():
        os.environ.setdefault("VMO_COMMIT", json.loads(KIT_FILE.read_text())["commit"])
    run = Run(args.device, work_dir, bench_dir.absolute(), results)
    return int(not run_steps(steps, run, results, args.limit_total))


def roomiest(device: str, work_dir: Path) -> Path:
    """Where the benchmark's model goes unless that is said: memory, if there is enough of it."""
    shared = Path("/dev/shm")
    if device == "cpu" or not shared.exists():
        return work_dir
    has_room = shutil.disk_usage(shared).free >= BENCH_DISK_BYTES
    has_memory = memory()["MemAvailable"] >= BENCH_MEMORY_BYTES
    return shared / work_dir.name if has_room and has_memory else work_dir


if __name__ == "__main__":
    sys.exit(main())
