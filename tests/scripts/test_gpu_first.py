"""The sequence's bookkeeping: limits, failures, what needs what, JSON at every moment.

The steps themselves run in the rehearsal (``scripts/gpu_first.py --rehearse``).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from scripts import gpu_first, gpu_kit, gpu_sequence
from scripts.gpu_first import run_step, run_steps
from scripts.gpu_sequence import STEPS, Command, Run, Step

ROOT = Path(__file__).resolve().parents[2]
FINDINGS = (
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); from scripts.gpu_findings import note"
)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    work = tmp_path / "work"
    work.mkdir()
    return Run("cpu", work, work, tmp_path / "results")


def python(name: str, code: str, **fields: object) -> Command:
    """A command that runs a little program."""
    return Command(name, (sys.executable, "-c", code), **fields)  # type: ignore[arg-type]


def step(name: str, *commands: Command, limit_s: float = 60.0) -> Step:
    return Step(name, limit_s, lambda run, seconds: list(commands))


def written(run: Run, name: str) -> dict:
    return json.loads((run.results / f"{name}.json").read_text())


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


# ---- a step ------------------------------------------------------------------------------


def test_a_step_that_passes_says_what_it_found(run: Run) -> None:
    code = f"{FINDINGS}; note('bandwidth', bytes_per_s=7); print('the end')"
    run_step(step("one", python("measure", code)), run, run.results)
    record = written(run, "one")
    assert record["status"] == "passed"
    assert record["findings"] == [{"name": "bandwidth", "bytes_per_s": 7}]
    assert record["log_tail"].endswith("the end\n")
    assert {"hardware", "versions", "git", "date", "limit_s", "seconds"} <= record.keys()
    assert record == run.record("one"), "later calls read the same"


def test_a_step_that_fails_is_told_with_its_log_and_what_it_found_before(run: Run) -> None:
    code = f"{FINDINGS}; note('a', n=1); print('what went wrong'); raise SystemExit(3)"
    later = python("later", "print('still runs')")
    run_step(step("one", python("measure", code), later), run, run.results)
    record = written(run, "one")
    assert record["status"] == "failed"
    assert record["reason"] == "measure: failed"
    assert [c["status"] for c in record["commands"]] == ["failed", "passed"]
    assert record["commands"][0]["exit_status"] == 3
    assert record["findings"] == [{"name": "a", "n": 1}]
    assert "what went wrong" in record["log_tail"]


def test_a_step_that_hangs_ends_at_its_limit_with_all_that_it_started(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_first, "KILL_GRACE_S", 0.5)
    pids = run.work_dir / "pids"
    # Deaf to SIGTERM, and so is its child.
    code = (
        f"{FINDINGS}; import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "note('begun'); child = os.fork();"
        f"open({str(pids)!r}, 'a').write(f'{{os.getpid()}} ');"
        "time.sleep(3600)"
    )
    hanging = step("one", python("hang", code), python("next", "pass"), limit_s=4.0)
    assert not run_steps([hanging, step("two", python("two", "pass"))], run, run.results)
    record = written(run, "one")
    assert record["status"] == "timed out"
    assert record["findings"] == [{"name": "begun"}]
    assert record["commands"][0]["reason"] == "the step's limit was over"
    assert record["seconds"] < 3600
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) == 2
    for _ in range(100):
        if not any(map(is_running, started)):
            break
        time.sleep(0.1)
    assert not any(map(is_running, started))
    assert written(run, "two")["status"] == "passed"


def test_findings_are_in_the_json_while_the_step_runs(run: Run) -> None:
    """A call that is killed from outside keeps what was found."""
    path = run.results / "one.json"
    code = (
        f"{FINDINGS}; import json, pathlib, time; note('first', n=1)\n"
        f"path = pathlib.Path({str(path)!r})\n"
        "while not json.loads(path.read_text())['findings']: time.sleep(.05)\n"
        "status = json.loads(path.read_text())['status']; note('status', status=status)"
    )
    run_step(step("one", python("measure", code)), run, run.results)
    assert written(run, "one")["findings"][-1] == {"name": "status", "status": "running"}


def test_a_program_that_is_not_there_fails_and_nothing_else(run: Run) -> None:
    missing = Command("missing", ("/nowhere/program",))
    run_step(step("one", missing), run, run.results)
    assert "No such file" in written(run, "one")["reason"]


@pytest.mark.parametrize(
    ("tests", "least", "status"),
    [
        ("def test_a(): pass", 1, "passed"),
        ("def test_a(): assert not 'because'", 1, "failed"),
        ("import pytest\n@pytest.mark.skip\ndef test_a(): pass", 0, "passed"),
        ("import pytest\n@pytest.mark.skip\ndef test_a(): pass", 1, "failed"),
        ("", 0, "failed"),
    ],
)
def test_pytest_is_judged_by_what_really_ran(
    tests: str, least: int, status: str, run: Run, tmp_path: Path
) -> None:
    file, junit = tmp_path / "test_some.py", tmp_path / "some.xml"
    file.write_text(tests)
    bare = ("env", "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1")  # starts a second earlier
    argv = (*bare, sys.executable, "-m", "pytest", "-q", f"--junitxml={junit}", str(file))
    run_step(step("one", Command("tests", argv, junit, least)), run, run.results)
    record = written(run, "one")
    assert record["status"] == status
    if "because" in tests:
        (message,) = record["commands"][0]["failed_tests"].values()
        assert "because" in message


# ---- what needs what ---------------------------------------------------------------------


def record(run: Run, name: str, status: str, *, commands=(), findings=()) -> None:
    run.state.mkdir(exist_ok=True)
    data = {"status": status, "commands": list(commands), "findings": list(findings)}
    (run.state / f"{name}.json").write_text(json.dumps(data))


def obstacles(run: Run) -> set[str]:
    return {name for name, step in STEPS.items() if step.obstacle(run) is not None}


def test_nothing_is_held_up_by_what_was_left_out(run: Run) -> None:
    assert obstacles(run) == set()


def test_kernels_that_break_the_rule_have_no_tokens(run: Run) -> None:
    wrong = [{"name": "rule", "equal": False}]
    record(run, "kernels", "failed", findings=wrong)
    assert obstacles(run) == {"tokens"}
    outcome = run_step(STEPS["tokens"], run, run.results)
    assert outcome["status"] == "not run"
    assert outcome["reason"] == "the kernels do not follow the rule"
    # And what was not run holds up what needs its result.
    assert obstacles(run) == {"tokens", "bench", "misses", "profile"}


@pytest.mark.parametrize(
    "findings", [[], [{"name": "rule", "equal": True}], [{"name": "rule", "left_out": "no"}]]
)
def test_kernels_that_were_not_wrong_hold_nothing_up(run: Run, findings: list) -> None:
    """The link may have failed, or time was over."""
    record(run, "kernels", "failed", findings=findings)
    assert obstacles(run) == set()


def test_wrong_tokens_without_graphs_end_what_would_measure_them(run: Run) -> None:
    findings = [{"name": "qwen3_moe, eager", "equal": False}]
    record(run, "tokens", "failed", findings=findings)
    assert obstacles(run) == {"bench", "misses", "profile"}


def test_where_only_graphs_fail_the_benchmark_does_without(run: Run) -> None:
    on_gpu = replace(run, device="cuda")
    eager = {"name": "qwen3_moe, eager", "equal": True}
    graphs = {"name": "qwen3_moe, FULL_AND_PIECEWISE", "equal": False}
    record(run, "tokens", "failed", findings=[eager, graphs])
    assert obstacles(run) == set()
    for name in ("bench", "misses", "profile"):
        for command in STEPS[name].commands(on_gpu, 300.0):
            assert "--enforce-eager" in command.argv
    record(run, "tokens", "passed", findings=[eager, graphs | {"equal": True}])
    for command in STEPS["bench"].commands(on_gpu, 300.0):
        assert "--enforce-eager" not in command.argv


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_command_takes_its_arguments(
    run: Run, device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A GPU's command lines are parsed here, where nothing can run them."""
    from scripts import bench_gpu, gpu_profile

    for name, module, more in (
        ("bench", bench_gpu, ["--list"]),
        ("misses", bench_gpu, ["--list"]),
        ("profile", gpu_profile, []),
    ):
        for command in STEPS[name].commands(replace(run, device=device), 300.0):
            monkeypatch.setattr(sys, "argv", [*command.argv[1:], *more])
            monkeypatch.setattr(gpu_profile, "check_device", lambda device: None)
            monkeypatch.setattr(gpu_profile, "start", lambda args: (None, []))
            assert module.main() == 0, capsys.readouterr().err


def test_shares_that_are_worth_least_come_last(run: Run) -> None:
    (command,) = STEPS["misses"].commands(replace(run, device="cuda"), 300.0)
    parts = [word for word in command.argv if word.endswith("-misses")]
    assert [part.removeprefix("qwen3-30b-a3b-") for part in parts] == [
        *("25-misses", "all-but-one-misses", "50-misses", "12.5-misses")
    ]
    bench, fits = STEPS["bench"].commands(replace(run, device="cuda"), 412.0)
    assert bench.argv[bench.argv.index("decode-8") + 1].startswith("--")
    limits = [float(c.argv[c.argv.index("--time-limit-s") + 1]) for c in (bench, fits)]
    assert sum(limits) == 400.0


# ---- time, and what is done meanwhile ----------------------------------------------------


def test_the_last_steps_fall_away_where_time_is_short(run: Run) -> None:
    first = step("one", python("one", "import time; time.sleep(.5)"))
    assert not run_steps([first, step("two", python("two", "pass"))], run, run.results, 8.2)
    assert written(run, "one")["status"] == "passed"
    assert written(run, "one")["limit_s"] == pytest.approx(8.2)
    assert written(run, "two")["status"] == "not run"
    assert written(run, "two")["reason"] == "the time of all steps was over"


def preparing(name: str, code: str) -> Step:
    """A step that waits for what is prepared beside it to begin."""
    begun = "import pathlib, time\nwhile not pathlib.Path('{0}').exists(): time.sleep(.05)"
    return Step(
        name,
        60.0,
        lambda run, _: [python("wait", begun.format(run.work_dir / "begun"))],
        prepared=lambda run: python(
            "prepare", f"import pathlib; pathlib.Path('{run.work_dir}/begun').touch(); {code}"
        ),
    )


def test_models_are_written_beside_a_step_and_are_there_for_the_next(run: Run) -> None:
    done = run.work_dir / "done"
    late = preparing("one", f"import time; time.sleep(1); pathlib.Path('{done}').touch()")
    after = step("bench", python("bench", f"import os; os.stat('{done}')"))
    assert run_steps([late, after], run, run.results)


def test_nothing_is_prepared_for_nobody(run: Run) -> None:
    alone = replace(preparing("one", "pass"), commands=lambda *_: [python("one", "pass")])
    assert run_steps([alone, step("formats", python("f", "pass"))], run, run.results)
    assert not (run.work_dir / "begun").exists()


def test_preparing_that_hangs_is_killed_and_fails_no_step(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(gpu_first, "BESIDE_LIMIT_S", 0.1)
    hanging = preparing("one", "import time; time.sleep(3600)")
    assert run_steps([hanging, step("bench", python("bench", "pass"))], run, run.results)
    assert "=== prepare, meanwhile: status -9; " in capsys.readouterr().out


# ---- the command line --------------------------------------------------------------------


def test_steps_and_their_limits_are_those_of_the_plan() -> None:
    assert {name: step.limit_s for name, step in STEPS.items()} == {
        "probe": 10,
        "kernels": 120,
        "tokens": 180,
        "bench": 420,
        "misses": 360,
        "profile": 90,
        "formats": 120,
    }


def first(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "gpu_first.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--results is needed"),
        (["--only", "prob"], "invalid choice: 'prob'"),
        (["--from", "x"], "invalid choice: 'x'"),
        (["--limit", "bench"], "--limit bench: allowed is STEP=SECONDS"),
        (["--limit", "banch=3"], "--limit banch=3: allowed is STEP=SECONDS, STEP of probe, "),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    results = ["--results", tmp_path] if arguments else []
    done = first(*arguments, *results)
    assert done.returncode == 2
    assert message in done.stderr


def test_one_step_alone_runs_from_anywhere(tmp_path: Path) -> None:
    done = first(
        *("--device", "cpu", "--only", "probe"),
        *("--results", tmp_path / "a", "--work-dir", tmp_path / "b"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["probe.json"]
    findings = json.loads((tmp_path / "a" / "probe.json").read_text())["findings"]
    names = [finding["name"] for finding in findings]
    assert {"gpu", "tools", "software", "disks", "hugepages", "memory", "limits"} <= set(names)


def test_the_probe_says_what_nvidia_smi_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'A GPU, 580.1, 81559 MiB, 81000 MiB, 5, 5, 16, 9.0'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "gpu_probe.py"), "--touch-gb", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    findings = {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert findings["gpu"]["fields"]["name"] == "A GPU"
    assert findings["gpu"]["fields"]["compute_cap"] == "9.0"


# ---- the kit -----------------------------------------------------------------------------


def test_a_kit_that_is_too_large_is_refused(tmp_path: Path) -> None:
    piece = tmp_path / "vllm.tar.xz"
    piece.write_bytes(b"")
    assert (
        gpu_kit.check_sizes(1_000_000, 2_000_000, [piece])[0] == "kit packed: 1.00 MB of 8 MB"
    )
    with pytest.raises(gpu_kit.KitError, match=r"too large: kit packed: 8.50 MB of 8 MB"):
        gpu_kit.check_sizes(8_500_000, 0, [piece])
    with piece.open("wb") as file:
        file.truncate(63 << 20)  # sparse
    with pytest.raises(gpu_kit.KitError, match=r"in one transfer: 6\d\.\d of 64 MiB"):
        gpu_kit.check_sizes(1_000_000, 2_000_000, [piece])


# ---- the rehearsal's watchman ------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "offence"),
    [
        (f"open({str(ROOT / 'README.md')!r})", "looks at"),
        (f"import os; os.listdir({str(ROOT)!r})", "looks at"),
        ("import subprocess; subprocess.run(['git', 'log'], check=False)", "runs git"),
        ("import subprocess; subprocess.run(['/usr/bin/gcc', '-v'], check=False)", "runs gcc"),
        # As socket.connect tells an audit hook.
        (
            "import sys; sys.audit('socket.connect', None, ('192.0.2.1', 9))",
            "connects to 192.0.2.1",
        ),
        (
            "import socket; socket.socket().connect_ex(('127.0.0.1', 9)); open('/dev/null')",
            None,
        ),
        ("import subprocess; subprocess.run(['true'], check=False)", None),
    ],
)
def test_the_rehearsal_sees_what_a_bare_machine_lacks(
    code: str, offence: str | None, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=False,
        cwd=tmp_path,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT / "scripts" / "rehearsal"),
            "VMO_REHEARSAL_LOG": str(log),
            "VMO_REHEARSAL_CLONE": str(ROOT),
            "VMO_REHEARSAL_ALLOWED": os.pathsep.join(
                [sys.prefix, sys.base_prefix, str(ROOT / "scripts" / "rehearsal")]
            ),
        },
    )
    found = log.read_text() if log.exists() else ""
    assert (offence in found) if offence else found == ""


def test_engines_stay_on_this_machine(run: Run) -> None:
    environment = gpu_sequence.environment(run)
    assert environment["VLLM_HOST_IP"] == "127.0.0.1"
    assert environment["GLOO_SOCKET_IFNAME"] == environment["NCCL_SOCKET_IFNAME"] == "lo"
    assert environment["HF_HUB_OFFLINE"] == "1"
    home = Path.home()
    for name in ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "XDG_CACHE_HOME"):
        assert home not in Path(environment[name]).parents


def test_signals_to_a_group_that_is_gone_are_no_error() -> None:
    process = subprocess.Popen(["true"], start_new_session=True)
    process.wait()
    gpu_first._signal_group(process.pid, signal.SIGKILL)
