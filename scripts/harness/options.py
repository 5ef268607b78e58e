"""Options that all benchmarks have, and the directories that they name."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WORK = ROOT / "build" / "bench"
QUICK_RESULTS = WORK / "results"


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


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Adds what benchmarks that start servers have besides: ``--eager``."""
    parser.add_argument("--eager", action="store_true", help="serve with --enforce-eager")


def end_on_sigterm() -> None:
    """Makes SIGTERM raise SystemExit, so that servers are stopped and cgroups removed."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))


def results_of(args: argparse.Namespace) -> Path:
    """Where the report goes: a quick try must not replace a measurement."""
    if args.results is not None:
        return Path(args.results)
    return QUICK_RESULTS if args.quick else RESULTS


def log_path(args: argparse.Namespace, name: str) -> Path:
    """Where the process called ``name`` writes its log; the directory is there."""
    directory: Path = args.work_dir / "logs"
    directory.mkdir(parents=True, exist_ok=True)
    return directory / f"{name}.log"
