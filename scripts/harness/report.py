"""The JSON report of a benchmark, and the table of bars.

A report says on what it was measured (hardware, versions, commit), how (command line,
parameters), every raw sample, the medians, and the bars that it was measured against.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts.harness.machine import commit, hardware, versions
from scripts.harness.options import RESULTS, ROOT, WORK, results_of


@dataclass(frozen=True, slots=True)
class Bar:
    """What a measured value must reach.

    Attributes:
        name: what was measured.
        measured: the value; None if it could not be measured (the bar is missed).
        limit: what it must reach, or stay at or below.
        unit: of both, for the table.
        at_least: whether ``limit`` is a minimum.
    """

    name: str
    measured: float | None
    limit: float
    unit: str = ""
    at_least: bool = True

    @property
    def met(self) -> bool:
        """Whether the value is on the right side of the limit."""
        if self.measured is None:
            return False
        if self.at_least:
            return self.measured >= self.limit
        return self.measured <= self.limit

    def to_json(self) -> dict[str, Any]:
        """Plain data for a report."""
        return {
            "name": self.name,
            "measured": self.measured,
            "limit": self.limit,
            "unit": self.unit,
            "at_least": self.at_least,
            "met": self.met,
        }


def report_of(
    args: argparse.Namespace,
    name: str,
    data: Mapping[str, Any],
    bars: Sequence[Bar] = (),
    *,
    quiet: bool = False,
) -> Path:
    """:func:`write_report` to where the command line says, about the disk that it names."""
    return write_report(
        name, data, bars=bars, work_dir=args.work_dir, results=results_of(args), quiet=quiet
    )


def write_report(
    name: str,
    data: Mapping[str, Any],
    *,
    bars: Sequence[Bar] = (),
    work_dir: Path = WORK,
    results: Path = RESULTS,
    quiet: bool = False,
) -> Path:
    """Writes ``<results>/<name>.json`` and prints the bars.

    Folders of this machine appear by what they are (see :func:`without_folders`).

    Args:
        name: of the benchmark; an older report of that name is replaced.
        data: plain data: ``parameters``, ``samples``, ``medians`` and whatever else.
        bars: what the figures were to reach.
        work_dir: names the disk that was measured.
        results: directory, created if it is missing.
        quiet: print nothing.
    """
    report = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "hardware": hardware(work_dir),
        "versions": versions(),
        "git": commit(),
        **data,
        "bars": [bar.to_json() for bar in bars],
    }
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    text = json.dumps(report, indent=1, default=_plain)
    text = without_folders(text, {work_dir: "<work-dir>", results: "<results>"})
    temporary.write_text(_NUMBERS.sub(_on_one_line, text) + "\n")
    temporary.rename(path)
    if quiet:
        return path
    console = Console()
    if bars:
        console.print(bars_table([(name, bar.to_json()) for bar in bars]))
    console.print(f"Report: {path}")
    return path


def without_folders(text: str, folders: Mapping[Path, str]) -> str:
    """``text`` without the folders of this machine: they are nobody's business, and no result.

    Paths below the project's root become relative to it. Other ``folders``, those that Python
    and its modules come from, and the home directory are replaced by what they are. What is
    the same everywhere, such as ``/usr``, stays.
    """
    names = {
        **dict.fromkeys(map(Path, sys.path), "<modules>"),
        **dict.fromkeys(map(Path, (sys.prefix, sys.base_prefix)), "<python>"),
        Path(os.path.expanduser("~")): "~",
        **{folder.absolute(): name for folder, name in folders.items()},
        ROOT: ".",
    }
    for folder in sorted(names, key=lambda folder: -len(str(folder))):
        is_common = len(folder.parts) < 2 or folder.is_relative_to("/usr")
        if not folder.is_absolute() or is_common or ROOT in folder.parents:
            continue
        itself = rf"(?<![\w.-]){re.escape(str(folder))}(?![\w.-])"
        if folder == ROOT:
            text = re.sub(itself + "/", "", text)
        text = re.sub(itself, names[folder], text)
    return text


_NUMBERS = re.compile(r"\[\s+(-?[0-9][-+0-9.eE,\s]*?)\s+\]")
"""A list of nothing but numbers; strings begin with a quote and cannot match."""


def _on_one_line(found: re.Match[str]) -> str:
    return "[" + " ".join(found[1].split()) + "]"


def _plain(value: Any) -> Any:
    """Numbers of numpy and paths as JSON knows them."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot go into a report")


def bars_table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """Bars as ``(benchmark, Bar.to_json())``."""
    table = Table(title="Bars")
    for column in ("benchmark", "what", "measured", "bar", "met"):
        table.add_column(column, justify="right" if column in ("measured", "bar") else "left")
    for name, bar in rows:
        measured = "-" if bar["measured"] is None else f"{bar['measured']:.4g} {bar['unit']}"
        sign = ">=" if bar["at_least"] else "<="
        table.add_row(
            name,
            str(bar["name"]),
            measured,
            f"{sign} {bar['limit']:g} {bar['unit']}",
            "[green]yes[/green]" if bar["met"] else "[red]NO[/red]",
        )
    return table
