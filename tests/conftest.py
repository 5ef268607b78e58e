"""What is left out where vLLM is not installed, and the report of `make test-all`."""

from __future__ import annotations

import importlib.util
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

NEEDS_VLLM = ("integration", "scripts/test_apply_patches.py")
"""Below this folder: what imports vLLM, or reads its installed files."""


def has_vllm() -> bool:
    """Whether vLLM's code is there; its metadata alone is not enough."""
    try:
        return importlib.util.find_spec("vllm") is not None
    except ModuleNotFoundError:
        return False


collect_ignore = [] if has_vllm() else list(NEEDS_VLLM)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--results FILE``: what ran, on what, and how it ended."""
    parser.addoption(
        "--results", type=Path, metavar="FILE", help="write a JSON report of this run"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Only a run that asks for a report pays for it."""
    path = config.getoption("--results")
    if path is not None:
        config.pluginmanager.register(Results(path), "results")


def pytest_report_header() -> list[str]:
    """What is left out is said, as it is not counted as skipped."""
    return [] if has_vllm() else [f"vLLM is not installed; left out: {', '.join(NEEDS_VLLM)}"]


class Results:
    """Writes one JSON for a run: each cell that starts vLLM or is slow, counts of the rest."""

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._began = time.time()
        self._cells: dict[str, dict[str, Any]] = {}
        self._counts: Counter[str] = Counter()
        self._seconds: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test is what its call was, unless setup or teardown went wrong.

        Its seconds include its setup: where tests share an engine, the first of them starts it.
        """
        self._seconds[report.nodeid] += report.duration
        if report.when != "call" and report.passed:
            return
        self._counts[report.outcome] += 1
        is_cell = "vllm" in report.keywords or "slow" in report.keywords
        if report.passed and not is_cell:
            return
        cell: dict[str, Any] = {
            "outcome": report.outcome,
            "seconds": round(self._seconds[report.nodeid], 1),
        }
        if not report.passed:
            cell["reason"] = str(report.longreprtext).strip().splitlines()[-1:]
        self._cells[report.nodeid] = cell

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """A run that was interrupted is written too, with its exit status."""
        from scripts.harness.machine import commit, hardware, versions

        report = {
            "date": time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime(self._began)),
            "git": commit(),
            "versions": versions(),
            "hardware": hardware(self._path.parent),
            "exit_status": int(exitstatus),
            "seconds": round(time.time() - self._began),
            "counts": dict(self._counts),
            "cells": self._cells,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(report, indent=1, default=str) + "\n")
