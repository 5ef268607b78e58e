"""The program: its subcommands, its parser, its exit status."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from typing import Any

from vllm_moe_offload import __version__
from vllm_moe_offload.cli import plan, replay, store, trace_finish, trace_show
from vllm_moe_offload.cli.command import Command
from vllm_moe_offload.store import StoreError
from vllm_moe_offload.transfer.flights import TransferError

COMMANDS: list[Command] = [
    plan.COMMAND,
    replay.COMMAND,
    *store.COMMANDS,
    trace_finish.COMMAND,
    trace_show.COMMAND,
]
GROUP_HELP = {"trace": "recorded traces and collections", "store": "expert stores"}


def build_parser() -> argparse.ArgumentParser:
    """Parser of all :data:`COMMANDS`."""
    parser = argparse.ArgumentParser(
        prog="vllm-moe-offload", description="Mixture-of-Experts models bigger than memory."
    )
    parser.add_argument("--version", action="version", version=__version__)
    top = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    groups: dict[str, Any] = {}
    for command in COMMANDS:
        *group, name = command.path
        parent = top
        if group:
            if group[0] not in groups:
                group_parser = top.add_parser(group[0], help=GROUP_HELP.get(group[0]))
                groups[group[0]] = group_parser.add_subparsers(required=True, metavar="COMMAND")
            parent = groups[group[0]]
        subparser = parent.add_parser(name, help=command.help, description=command.help)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. Errors are one line on stderr and status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files may be no text; on stderr they are shown like that anyway.
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (OSError, StoreError, TransferError, ValueError) as error:
        print(f"vllm-moe-offload: error: {error}", file=sys.stderr)
        return 2
