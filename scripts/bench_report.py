"""Which bars the reports met.

python scripts/bench_report.py [--strict]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.harness.options import RESULTS  # noqa: E402
from scripts.harness.report import bars_table  # noqa: E402


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
