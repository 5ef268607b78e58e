"""Asks Prometheus what every panel of the Grafana dashboard would show, and prints it.

    python scripts/show_dashboard.py [--prometheus http://127.0.0.1:9090]

Variables are All, ranges one minute. Exits with 1 if a query fails or finds nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

DASHBOARD = Path(__file__).resolve().parent.parent / "examples" / "grafana-dashboard.json"
RANGE = "1m"


def queries(dashboard: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Of every panel's targets: title, legend, expression with Grafana's variables filled in."""
    names = {variable["name"] for variable in dashboard["templating"]["list"]}
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", RANGE)
            for name in names:
                expression = expression.replace(f'"${name}"', '".*"')
            yield panel["title"], target.get("legendFormat", ""), expression


def ask(prometheus: str, expression: str) -> list[dict[str, Any]]:
    """Samples of an instant query.

    Raises:
        RuntimeError: Prometheus says that the query is wrong.
    """
    address = f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    try:
        with urllib.request.urlopen(address, timeout=30) as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{expression}: {error.read().decode()}") from error
    return result


def legend_of(template: str, labels: dict[str, str]) -> str:
    """A legend as Grafana fills it in; without one all labels."""
    if not template:
        return ", ".join(f"{k}={v}" for k, v in sorted(labels.items()) if k != "__name__")
    for name, value in labels.items():
        template = template.replace("{{" + name + "}}", value)
    return template


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prometheus",
        default="http://127.0.0.1:9090",
        metavar="URL",
        help="default: %(default)s",
    )
    parser.add_argument("--dashboard", type=Path, default=DASHBOARD, metavar="JSON")
    args = parser.parse_args()

    table = Table("panel", "series", "value")
    num_empty = 0
    for title, legend, expression in queries(json.loads(args.dashboard.read_text())):
        samples = ask(args.prometheus, expression)
        num_empty += not samples
        if not samples:
            table.add_row(title, "[red]no data[/red]", "")
        for sample in samples:
            value = f"{float(sample['value'][1]):.6g}"
            table.add_row(title, legend_of(legend, sample["metric"]), value)
    Console().print(table)
    return int(num_empty > 0)


if __name__ == "__main__":
    sys.exit(main())
