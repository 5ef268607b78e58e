"""``vllm-moe-offload trace finish``: the trace of a recording that a server could not write."""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_moe_offload.cli.command import Command
from vllm_moe_offload.trace.finish import finish_trace


def _add_finish_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "trace",
        metavar="TRACE.npz",
        type=Path,
        help="what record_trace was to write; what was recorded lies beside it, in "
        "TRACE.npz.spool, if the server was killed or the disk was full",
    )


def _run_finish(arguments: argparse.Namespace) -> int:
    tokens, requests = finish_trace(arguments.trace)
    print(f"wrote the routing of {tokens} tokens of {requests} requests to {arguments.trace}")
    return 0


COMMAND = Command(
    ("trace", "finish"),
    "write the trace that a server could not",
    _add_finish_arguments,
    _run_finish,
)
