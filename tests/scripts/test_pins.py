"""Versions that are written down twice are the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
