"""scripts/gpu_suite.sh: its steps, wrong arguments, failures, what it builds and where it writes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts import bench_gpu as bench  # noqa: E402
from scripts import gpu_plan as plan  # noqa: E402

PARTS = plan.parts_of(plan.MODELS)
SUITE = ROOT / "scripts" / "gpu_suite.sh"


def test_the_suite_runs_every_part_of_the_benchmark() -> None:
    listed = subprocess.run([SUITE, "--list"], check=True, capture_output=True, text=True)
    assert [
        line.split()[1].removeprefix("bench:")
        for line in listed.stdout.splitlines()
        if "bench:" in line
    ] == [part.name for part in PARTS]
    assert [
        line.split()[1].removeprefix("misses:")
        for line in listed.stdout.splitlines()
        if "misses:" in line
    ] == [model.name for model in plan.MODELS]


def test_the_suite_asks_what_misses_cost_at_every_share(folder: Path) -> None:
    subprocess.run(
        [folder / "scripts" / SUITE.name, "--inner", "misses:qwen3-30b-a3b"],
        check=True,
        capture_output=True,
        env={"PYTHON": str(folder / "bin" / "python"), "PATH": "/usr/bin:/bin"},
    )
    (asked,) = (folder / "asked").read_text().splitlines()
    parts = [word for word in asked.split() if word.endswith("-misses")]
    assert parts == [part.name for part in plan.sweep_of(plan.MODELS[:1])]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "99"], "--part 99: parts are 1 to"),
        (["--part", "x"], "--part x: parts are 1 to"),
        (["--part"], "--part needs a value"),
        (["--pat", "1"], "unknown argument --pat"),
    ],
)
def test_the_suite_refuses_wrong_arguments(arguments: list[str], message: str) -> None:
    done = subprocess.run([SUITE, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr


def test_the_suite_notes_failures_and_goes_on(tmp_path: Path) -> None:
    """An interpreter that fails at everything but the report."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase $1 in *gpu_report.py) exec "{sys.executable}" "$@";; esac\nexit 3\n'
    )
    python.chmod(0o755)
    parts = subprocess.run([SUITE, "--list"], check=True, capture_output=True, text=True).stdout
    numbers = {line.split()[1]: line.split()[0] for line in parts.splitlines()[:-1]}
    done = subprocess.run(
        [
            *(SUITE, "--results", tmp_path, "--work-dir", tmp_path),
            *("--part", numbers["tests"], "--part", numbers["bench:mixtral-8x7b-25"]),
        ],
        check=False,
        capture_output=True,
        text=True,
        env={"PYTHON": str(python), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 1
    assert "tests (status 3)" in done.stdout
    written = bench.load(tmp_path)
    assert {name: step["status"] for name, step in written["steps"].items()} == {
        "tests": 3,
        "bench:mixtral-8x7b-25": 3,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the suite in it, and an interpreter that notes what it is asked for."""
    root = tmp_path / "folder"
    for name in ("scripts", "vllm_moe_offload", "bin"):
        (root / name).mkdir(parents=True)
    shutil.copy(SUITE, root / "scripts")
    python = root / "bin" / "python"
    python.write_text(f'#!/bin/sh\necho "$(basename $0) $*" >>{root}/asked\n')
    python.chmod(0o755)
    return root


BROUGHT = {
    "vllm_moe_offload/_core.so": "python setup.py --quiet build_ext --inplace",
    "vllm_moe_offload.egg-info": "python setup.py --quiet egg_info",
}
"""What a build makes, and how."""


@pytest.mark.parametrize("brought", [[], *([name] for name in BROUGHT), list(BROUGHT)], ids=str)
def test_what_was_brought_is_not_built_again(folder: Path, brought: list[str]) -> None:
    for name in brought:
        (folder / name).write_text("brought")
    done = subprocess.run(
        [folder / "scripts" / SUITE.name, "--inner", "build"],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHON": str(folder / "bin" / "python"), "PATH": "/usr/bin:/bin"},
    )
    asked = (folder / "asked").read_text().splitlines()
    built = [how for name, how in BROUGHT.items() if name not in brought]
    assert asked == [*built, "python scripts/gpu_check.py"]
    for name in BROUGHT:
        assert (f"kept, not built: {name} " in done.stdout) == (name in brought)


def test_results_and_logs_of_the_suite_are_outside_of_its_folder(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    subprocess.run(
        [
            folder / "scripts" / SUITE.name,
            *("--results", "out", "--work-dir", tmp_path / "work", "--part", "2"),
        ],
        check=True,
        capture_output=True,
        cwd=tmp_path / "elsewhere",
        env={"PYTHON": str(folder / "bin" / "python"), "PATH": "/usr/bin:/bin"},
    )
    recorded, shown = (folder / "asked").read_text().splitlines()[-2:]
    results = f"python scripts/gpu_report.py --results {tmp_path}/elsewhere/out"
    assert recorded.startswith(f"{results} record tests --status 0 ")
    assert recorded.endswith(f"--log {tmp_path}/work/suite/tests.log")
    assert shown == results
    written = {path.name for path in folder.iterdir()}
    assert written == {"scripts", "vllm_moe_offload", "bin", "asked"}
