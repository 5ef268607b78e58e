"""``vllm-moe-offload trace show``: what a recorded trace or EAM collection holds."""

from __future__ import annotations

import argparse
import json

from rich.console import Console
from rich.table import Table

from vllm_moe_offload.cli.command import Command, load_pyplot
from vllm_moe_offload.trace.inspect import describe, plot_heat_maps


def _add_show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="routing trace or EAM collection")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--plot", metavar="FILE.png", help="draw heat maps of the experts used")


def _run_show(arguments: argparse.Namespace) -> int:
    summary, maps = describe(arguments.file)
    if arguments.json:
        print(json.dumps(summary, indent=2))
    else:
        table = Table(show_header=False)
        for key, value in summary.items():
            table.add_row(key.replace("_", " "), str(value))
        Console().print(table)
    if arguments.plot:
        plot_heat_maps(load_pyplot(), maps, arguments.plot)
    return 0


COMMAND = Command(
    ("trace", "show"),
    "what a recorded trace or EAM collection holds",
    _add_show_arguments,
    _run_show,
)
