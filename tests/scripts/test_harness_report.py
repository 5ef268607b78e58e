"""Reports: the commit they name, where they go, and what they do not tell of the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.harness import machine
from scripts.harness.machine import commit
from scripts.harness.options import ROOT
from scripts.harness.report import Bar, without_folders, write_report

# ---- the commit ------------------------------------------------------------------------


@pytest.fixture
def no_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without the program."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("VMO_COMMIT", raising=False)


@pytest.mark.parametrize(
    ("given", "dirty"), [("8098d904", False), ("8098d904-dirty", True), ("v1-rc", False)]
)
def test_a_commit_that_is_given_is_taken_and_git_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, given: str, dirty: bool
) -> None:
    def run(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("VMO_COMMIT", given)
    name = given.removesuffix("-dirty")
    assert commit() == {"commit": name, "dirty": dirty, "changed": []}


def test_without_git_the_commit_is_unknown_and_why_is_said(no_git: None) -> None:
    assert commit() == {
        "commit": None,
        "dirty": None,
        "changed": [],
        "reason": "no git program, and VMO_COMMIT is not set",
    }


def git(directory: Path, *arguments: str) -> str:
    """What git prints in a repository with an identity of its own."""
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", str(directory), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in the place of the project's root."""
    monkeypatch.delenv("VMO_COMMIT", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    root = tmp_path / "outer" / "project"
    root.mkdir(parents=True)
    monkeypatch.setattr(machine, "ROOT", root)
    return root


def test_a_folder_that_is_no_clone(project: Path) -> None:
    found = commit()
    assert found["commit"] is None
    assert "VMO_COMMIT is not set, and git says: fatal: not a git repository" in found["reason"]


def test_a_folder_inside_another_repository_has_not_its_commit(project: Path) -> None:
    git(project.parent, "init", "-q")
    git(project.parent, "commit", "-q", "--allow-empty", "-m", "another project")
    assert commit()["commit"] is None
    assert commit()["reason"] == "not a clone, and VMO_COMMIT is not set"


def test_a_clone_names_its_commit_and_what_differs(project: Path) -> None:
    git(project, "init", "-q")
    git(project, "commit", "-q", "--allow-empty", "-m", "first")
    head = git(project, "rev-parse", "HEAD")
    assert commit() == {"commit": head, "dirty": False, "changed": []}
    (project / "file").write_text("")
    assert commit() == {"commit": head, "dirty": True, "changed": ["?? file"]}


# ---- reports ---------------------------------------------------------------------------


def report_in(
    directory: Path, work_dir: Path, capsys: pytest.CaptureFixture[str], **data: Any
) -> tuple[dict[str, Any], str]:
    """A written report, and what was printed."""
    bars = [Bar("speed", 2.0, 1.0)]
    path = write_report("some", data, bars=bars, work_dir=work_dir, results=directory)
    assert [found.name for found in path.parent.iterdir()] == ["some.json"]
    return json.loads(path.read_text()), capsys.readouterr().out


@pytest.mark.parametrize("relative", [True, False])
def test_a_report_goes_anywhere_and_names_no_folder_of_the_machine(
    relative: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setattr(sys, "orig_argv", ["python", "x.py", f"--results={tmp_path}/out"])
    out, work = Path("out"), Path("work")
    work.mkdir()
    if not relative:
        out, work = tmp_path / out, tmp_path / work
    module = Path(json.__file__)
    text = (
        f'File "{module}", line 1\nFile "{ROOT}/scripts/x.py", in {ROOT}: ~ {tmp_path}/work/log'
    )
    found, printed = report_in(out, work, capsys, log=text, home="/home/somebody/.cache/vllm")
    written = json.dumps(found)
    for folder in (tmp_path, ROOT, Path("/home/somebody"), module.parent.parent):
        assert str(folder) not in written
    assert found["log"].splitlines()[1] == 'File "scripts/x.py", in .: ~ <work-dir>/log'
    assert found["home"] == "~/.cache/vllm"
    assert found["command"] == f"{Path(sys.executable).name} x.py --results=<results>"
    assert found["hardware"]["disk"]["directory"] == "<work-dir>"
    assert "speed" in printed


def test_a_quiet_report_prints_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_report("some", {}, bars=[Bar("a", 1.0, 1.0)], results=tmp_path, quiet=True)
    assert capsys.readouterr().out == ""


def test_only_whole_folders_are_replaced() -> None:
    folders = {Path("/data/work"): "<work-dir>"}
    for text, expected in {
        "/data/work": "<work-dir>",
        "/data/work/x": "<work-dir>/x",
        "--work-dir=/data/work,": "--work-dir=<work-dir>,",
        "/data/workers/x": "/data/workers/x",
        "/data/work-2": "/data/work-2",
        "/other/data/work": "/other/data/work",
        f"{ROOT}-2/x": f"{ROOT}-2/x",
        f"{ROOT}/build/bench": "build/bench",
        "/usr/lib/x": "/usr/lib/x",
    }.items():
        assert without_folders(text, folders) == expected


@pytest.mark.parametrize("relative", [True, False])
def test_a_step_is_recorded_outside_the_tree_without_git(
    relative: bool, tmp_path: Path, no_git: None
) -> None:
    (tmp_path / "log").write_text(f"error in {ROOT}/scripts/x.py\n")
    script = str(ROOT / "scripts" / "gpu_report.py")
    results = "out" if relative else str(tmp_path / "out")
    arguments = ["record", "tests", "--status=3", "--seconds=1", "--log=log"]
    for command in (["--results", results, *arguments], ["--results", results]):
        subprocess.run(
            [sys.executable, script, *command],
            check=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
        )
    written = (tmp_path / "out" / "gpu.json").read_text()
    step = json.loads(written)["steps"]["tests"]
    assert step["log_tail"] == "error in scripts/x.py\n"
    assert step["git"]["reason"] == "no git program, and VMO_COMMIT is not set"
    assert str(ROOT) not in written
    assert str(tmp_path) not in written
