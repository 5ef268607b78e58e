"""Planning cost of this checkout against another one's, in turns.

    python scripts/bench_planner_pair.py OTHER_CHECKOUT [--rounds 6]

Each checkout runs its own bench_planner.py, so that neither has to know the other's names; who
begins changes from round to round. The bar is the median over the rounds of the ratio of what a
layer call costs, here by there, for every policy and number of tokens. The other checkout must be
built (``pip install -e .`` there, or ``python setup.py build_ext --inplace``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.harness.options import parser_of  # noqa: E402
from scripts.harness.pairing import orders  # noqa: E402
from scripts.harness.report import Bar, report_of  # noqa: E402

MAY_COST = 1.0
"""Times what the other checkout takes."""

Cases = dict[tuple[str, float, int], float]


def cost_of(checkout: Path, extra: list[str]) -> Cases:
    """Microseconds per layer call by policy, share of the experts cached and tokens."""
    with tempfile.TemporaryDirectory() as results:
        subprocess.run(
            [sys.executable, "scripts/bench_planner.py", "--results", results, *extra],
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": str(checkout)},
            stdout=subprocess.DEVNULL,
            check=False,  # its own bars are not asked about here
        )
        report = json.loads((Path(results) / "planner.json").read_text())
    return {
        (case["policy"], case["cache"], case["tokens"]): case["total_us"]
        for case in report["cases"]
    }


def commit_of(checkout: Path) -> str:
    """What is checked out."""
    answer = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True
    )
    return answer.stdout.strip()


def main() -> int:
    """Exit status 1 if a bar is missed."""
    parser = parser_of(__doc__)
    parser.add_argument("other", type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    checkouts = {"here": ROOT, "other": args.other.resolve()}
    extra = ["--quick"] if args.quick else []
    rounds: list[dict[str, Cases]] = []
    for order in orders(list(checkouts), 1 if args.quick else args.rounds):
        costs = {name: cost_of(checkouts[name], extra) for name in order}
        rounds.append(costs)
        print(f"round {len(rounds)} of {args.rounds}", flush=True)
    rows: list[dict[str, Any]] = []
    for case in rounds[0]["here"]:
        policy, share, tokens = case
        here, other = ([costs[name][case] for costs in rounds] for name in checkouts)
        rows.append(
            {
                "policy": policy,
                "cache": share,
                "tokens": tokens,
                "here_us": here,
                "other_us": other,
                "ratio": median(a / b for a, b in zip(here, other, strict=True)),
            }
        )
    bars = [
        Bar(
            f"{row['policy']}, {row['cache']:.0%} cached, B={row['tokens']}: here / other",
            row["ratio"],
            MAY_COST,
            at_least=False,
        )
        for row in rows
    ]
    data = {"other_commit": commit_of(checkouts["other"]), "samples": rows}
    report_of(args, "planner_pair", data, bars)
    return int(not all(bar.met for bar in bars))


if __name__ == "__main__":
    sys.exit(main())
