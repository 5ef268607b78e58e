"""Runs `vllm` command lines, each in a fork of a process that imported vLLM once.

Reads lines of JSON from standard input, ``{"argv": [...], "environment": {...}, "patch": NAME or
null, "log": FILE}``, and answers each with its exit status. ``patch`` names a function of
:mod:`tests.messages.patches`, called before the command runs.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

import vllm.entrypoints.cli.main as cli
import vllm.entrypoints.cli.serve
import vllm.v1.executor.multiproc_executor  # noqa: F401 (what a front end would import)

from tests.messages import patches


def command(request: dict[str, Any]) -> None:
    """The child: becomes the command and ends with its status."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.environ.update(request["environment"])
    if request["patch"] is not None:
        getattr(patches, request["patch"])()
    sys.argv = ["vllm", *request["argv"]]
    cli.main()


def child(request: dict[str, Any]) -> int:
    """What the interpreter would make of the command's end."""
    try:
        command(request)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001 (as the interpreter)
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    """One fork per line."""
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                status = child(request)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, ended = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(ended), flush=True)


if __name__ == "__main__":
    main()
