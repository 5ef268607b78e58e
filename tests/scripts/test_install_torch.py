"""Which torch `make setup` ends up with, on machines that find builds in different places."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from scripts import install_torch

VERSION = "2.13.0"
CPU, CUDA = f"{VERSION}+cpu", VERSION
NEAR, INDEX, PLAIN = "near", "the CPU index", "plain"
BROKEN = "ImportError: libcudart.so.13: cannot open shared object file"


class Machine:
    """A double of pip and Python: what is installed, and which build is found where."""

    def __init__(self, installed: str | None = None, **found: str) -> None:
        self.installed = installed
        self.found = {NEAR: found.get("near"), PLAIN: found.get("plain")}
        self.found[INDEX] = found.get("index")
        self.asked: list[str] = []

    def run(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if "pip" in command:
            return self.pip(command)
        if self.installed in {None, CUDA}:
            error = BROKEN if self.installed else "ModuleNotFoundError: No module named 'torch'"
            return subprocess.CompletedProcess(command, 1, "", f"Traceback ...\n{error}\n")
        return subprocess.CompletedProcess(command, 0, f"{self.installed}\n", "")

    def pip(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        assert "--no-deps" in command
        where = INDEX if install_torch.CPU_INDEX in command else NEAR
        if command[-1] == f"torch=={VERSION}":
            where = PLAIN
        self.asked.append(where)
        if self.found[where] is None:
            return subprocess.CompletedProcess(
                command, 1, "", "ERROR: No matching distribution"
            )
        self.installed = self.found[where]
        return subprocess.CompletedProcess(command, 0, "", "")


def install(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> str | None:
    monkeypatch.setattr(install_torch.subprocess, "run", machine.run)
    return install_torch.install(VERSION)


@pytest.mark.parametrize(
    ("machine", "asked"),
    [
        (Machine(near=CPU, index=CPU, plain=CPU), [NEAR]),
        (Machine(index=CPU, plain=CUDA), [NEAR, INDEX]),
        (Machine(plain=CPU), [NEAR, INDEX, PLAIN]),
        (Machine(installed=CPU, near=CPU), []),
        (Machine(installed=CUDA, near=CPU), [NEAR]),  # an earlier try left PyPI's build
        (Machine(installed="2.12.0+cpu", near=CPU), [NEAR]),
    ],
    ids=["near", "index", "plain", "there", "broken", "older"],
)
def test_the_cpu_build_is_found(
    monkeypatch: pytest.MonkeyPatch, machine: Machine, asked: list[str]
) -> None:
    assert install(monkeypatch, machine) is None
    assert machine.installed == CPU
    assert machine.asked == asked


def test_a_build_for_cuda_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(plain=CUDA)
    assert install(monkeypatch, machine) == BROKEN
    assert machine.asked == [NEAR, INDEX, PLAIN]


def test_what_to_do_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lock = tmp_path / "cpu.lock"
    lock.write_text(f"# torch\ntorch=={VERSION}\ntorchless==1\n")
    monkeypatch.setattr(install_torch.subprocess, "run", Machine().run)
    monkeypatch.setattr("sys.argv", ["install_torch.py", str(lock)])
    with pytest.raises(SystemExit) as stop:
        install_torch.main()
    message = str(stop.value)
    assert "\n" not in message
    for part in (CPU, "No matching distribution", install_torch.CPU_INDEX, "PIP_FIND_LINKS"):
        assert part in message


def test_the_lock_of_the_project_names_torch_and_not_its_build() -> None:
    lock = Path(__file__).resolve().parents[2] / "requirements" / "cpu.lock"
    version = install_torch.locked_version(lock)
    assert "+" not in version  # whichever build is there, the lock's other packages go with it


def test_a_lock_without_torch_is_refused(tmp_path: Path) -> None:
    lock = tmp_path / "other.lock"
    lock.write_text("torchvision==1\ntorch==2.13.0+cpu\n")
    with pytest.raises(SystemExit, match="has no line torch==VERSION"):
        install_torch.locked_version(lock)


def test_the_index_is_not_waited_for_long() -> None:
    (asked,) = (source for source in install_torch.sources(VERSION) if "--index-url" in source)
    assert (
        int(asked[asked.index("--timeout") + 1])
        * (int(asked[asked.index("--retries") + 1]) + 1)
        <= 60
    )
