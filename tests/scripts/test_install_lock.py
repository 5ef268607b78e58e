"""Which torch `make setup` ends up with, on machines that find builds in different places."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from scripts import install_lock
from scripts.install_lock import InstallError

VERSION = "2.13.0"
CPU, CUDA = f"{VERSION}+cpu", f"{VERSION}+cu130"
NEAR, INDEX, REST = "near", "the CPU index", "the rest"


class Machine:
    """A double of pip and Python: what is installed, and which build is found where."""

    def __init__(self, installed: str | None = None, **found: str) -> None:
        self.installed = installed
        self.found = {NEAR: found.get("near"), INDEX: found.get("index")}
        self.asked: list[str] = []

    def run(self, command: tuple[str, ...], **_: object) -> subprocess.CompletedProcess[str]:
        if "pip" in command:
            return self.pip(command)
        if command[-1] == install_lock.IMPORT and REST not in self.asked:
            return subprocess.CompletedProcess(command, 1, "", "No module named 'sympy'\n")
        if self.installed in {None, CUDA}:
            error = f"Traceback\nAssertionError: torch is {self.installed}\n"
            return subprocess.CompletedProcess(command, 1, "", error)
        return subprocess.CompletedProcess(command, 0, f"{self.installed}\n", "")

    def pip(self, command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        assert "--no-deps" in command
        if "-r" in command:
            self.asked.append(REST)
            return subprocess.CompletedProcess(command, 0, "", "")
        where = INDEX if install_lock.CPU_INDEX in command else NEAR
        self.asked.append(where)
        if self.found[where] is None:
            return subprocess.CompletedProcess(
                command, 1, "", "ERROR: No matching distribution"
            )
        self.installed = self.found[where]
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "cpu.lock"
    path.write_text(f"# torch\ntorch=={VERSION}\ntorchless==1\n")
    return path


def setup(monkeypatch: pytest.MonkeyPatch, machine: Machine, lock: Path) -> None:
    monkeypatch.setattr(install_lock.subprocess, "run", machine.run)
    monkeypatch.setattr("sys.argv", ["install_lock.py", str(lock)])
    install_lock.main()


@pytest.mark.parametrize(
    ("machine", "asked"),
    [
        (Machine(near=CPU, index=CPU), [NEAR]),
        (Machine(index=CPU), [NEAR, INDEX]),
        (Machine(installed=CPU, near=CPU), []),
        (Machine(installed=CUDA, near=CPU), [NEAR]),  # an earlier try left PyPI's build
        (Machine(installed="2.12.0+cpu", near=CPU), [NEAR]),
    ],
    ids=["near", "index", "there", "for GPUs", "older"],
)
def test_the_cpu_build_is_found_and_then_the_rest(
    monkeypatch: pytest.MonkeyPatch, lock: Path, machine: Machine, asked: list[str]
) -> None:
    setup(monkeypatch, machine, lock)
    assert machine.installed == CPU
    assert machine.asked == [*asked, REST]


@pytest.mark.parametrize(
    "machine", [Machine(installed=CUDA), Machine()], ids=["for GPUs", "none"]
)
def test_without_one_what_to_do_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, lock: Path, machine: Machine
) -> None:
    with pytest.raises(SystemExit) as stop:
        setup(monkeypatch, machine, lock)
    assert machine.asked == [NEAR, INDEX]
    message = str(stop.value)
    assert "\n" not in message
    for part in (CPU, "No matching distribution", install_lock.CPU_INDEX, "PIP_FIND_LINKS"):
        assert part in message


def test_a_torch_that_does_not_import_is_no_success(
    monkeypatch: pytest.MonkeyPatch, lock: Path
) -> None:
    machine = Machine(near=CPU)
    monkeypatch.setattr(install_lock, "IMPORT", "import torch  # fails")
    broken = machine.run

    def run(command: tuple[str, ...], **more: object) -> subprocess.CompletedProcess[str]:
        if command[-1] == install_lock.IMPORT:
            return subprocess.CompletedProcess(command, 1, "", "ImportError: libgomp.so.1\n")
        return broken(command, **more)

    machine.run = run  # type: ignore[method-assign]
    with pytest.raises(SystemExit, match=r"libgomp\.so\.1"):
        setup(monkeypatch, machine, lock)


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch for CPUs")
def test_the_build_is_read_of_the_installed_torch() -> None:
    printed = install_lock.run(install_lock.sys.executable, "-c", install_lock.BUILD)
    assert printed == torch.__version__


def test_a_build_for_gpus_is_told_by_its_constants(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError\n")
    constants = f"__version__ = '{CUDA}'\ncuda = '13.0'\nhip = None\n"
    (tmp_path / "torch" / "version.py").write_text(constants)
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{install_lock.BUILD}"
    with pytest.raises(InstallError, match=r"cu130 is built for GPUs \(13\.0\)"):
        install_lock.run(install_lock.sys.executable, "-c", program)


def test_the_lock_of_the_project_names_torch_and_not_its_build() -> None:
    path = Path(__file__).resolve().parents[2] / "requirements" / "cpu.lock"
    version = install_lock.locked_version(path)
    assert "+" not in version  # pip then takes the build that is there for it


def test_a_lock_without_torch_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.lock"
    path.write_text("torchvision==1\ntorch==2.13.0+cpu\n")
    with pytest.raises(InstallError, match="has no line torch==VERSION"):
        install_lock.locked_version(path)


def test_the_index_is_not_waited_for_long() -> None:
    (asked,) = (source for source in install_lock.sources(VERSION) if "--index-url" in source)
    tries = int(asked[asked.index("--retries") + 1]) + 1
    assert tries * int(asked[asked.index("--timeout") + 1]) <= 60
