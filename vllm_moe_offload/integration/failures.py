"""Why a start failed: from the process that knows it to the last line that the user sees.

Engine core and workers are processes of their own. What goes wrong there reaches vLLM's front end as
"Engine core initialization failed. See root cause above." The process that fails leaves its
reason in the server's directory (:mod:`counters_dir`), and the front end raises that. Wrong
options need no traceback: the child leaves quietly, and the command ends with one line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm.ray.lazy_utils import is_in_ray_actor

from vllm_moe_offload.config import OptionError
from vllm_moe_offload.integration.counters_dir import counters_dir

logger = logging.getLogger("vllm.moe_offload")

OPTION_STATUS = 2
"""Exit status of a command that was given something impossible, as argparse's."""
START_STATUS = 1
"""Exit status if the engine did not start for another reason, as Python's of an exception."""
_NAME = "failure.json"
_TRACKER_IS_SILENT = "ignore:resource_tracker:UserWarning"

_front_end: int | None = None
"""Id of the process that made the configuration: what is raised there reaches the caller."""
_told = False


class StartError(RuntimeError):
    """The engine did not start; the message ends with the reason."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong first.

    Attributes:
        reason: one line.
        is_option: whether an option is to blame.
        ended_ranks: names of ranks that ended by themselves and took the engine with them.
    """

    reason: str
    is_option: bool
    ended_ranks: tuple[str, ...] = ()


def begin() -> None:
    """This process is the front end of what starts now; failures of earlier starts are over."""
    global _front_end, _told
    _front_end, _told = os.getpid(), False
    directory = counters_dir()
    if directory is not None:
        (directory / _NAME).unlink(missing_ok=True)
    # vLLM ends children that hold shared memory. Python's tracker frees it when all have ended, and
    # its warning of that would stand below the reason.
    warnings = os.environ.get("PYTHONWARNINGS", "")
    if _TRACKER_IS_SILENT not in warnings:
        os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [warnings, _TRACKER_IS_SILENT]))


def known_failure() -> Failure | None:
    """The failure that a process of this server left, if one did."""
    directory = counters_dir()
    if directory is None:
        return None
    try:
        left = json.loads((directory / _NAME).read_text())
    except FileNotFoundError:
        return None
    return Failure(left["reason"], left["is_option"], tuple(left["ended_ranks"]))


def leave_failure(error: Exception) -> Failure:
    """Leaves what went wrong for the front end; the first of several processes stays.

    Returns:
        The failure that stays.
    """
    failure = Failure(_reason(error), isinstance(error, OptionError))
    directory = counters_dir()
    if directory is None:
        return failure
    # Whole, or not there: a link to a file that was written before.
    own = _write_own(directory, failure)
    with contextlib.suppress(FileExistsError):
        os.link(own, directory / _NAME)
    own.unlink()
    return known_failure() or failure


def leave_ended_ranks(how: Mapping[str, str]) -> None:
    """Leaves that ranks ended by themselves; what other processes left is told behind it.

    Those failed because of it, usually before anybody knew: messages of the rank were missing.

    Args:
        how: each of them ended, by its name: ``ended: killed by SIGKILL``.
    """
    directory = counters_dir()
    if directory is None:
        return
    reasons = [f"{name} {in_words}" for name, in_words in how.items()]
    known = known_failure()
    if known is not None and known.is_option:
        return  # such processes end as well, and that is why
    if known is not None:
        reasons.append(f"then: {known.reason}")
    own = _write_own(directory, Failure("; ".join(reasons), False, tuple(how)))
    os.replace(own, directory / _NAME)


def _write_own(directory: Path, failure: Failure) -> Path:
    own = directory / f"{_NAME}.{os.getpid()}"
    _write_private(own, json.dumps(asdict(failure)))
    return own


def _write_private(path: Path, text: str) -> None:
    with open(path, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(text)


def in_child(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a part of a start; what it raises in a child of the front end is left for it.

    Raises:
        SystemExit: in a child, because of an option: status 2 and no traceback.
        OptionError, StartError: in the front end, because of a child's.
        OptionError, StartError: in a child of Ray's, maybe on another machine: Ray carries it.
        Exception: else what was raised.
    """
    try:
        return original(*args, **kwargs)
    except Exception as error:
        if os.getpid() == _front_end:
            raise_known(error)
        elif is_in_ray_actor():
            raise _of_this_node(error) from error
        elif leave_failure(error).is_option:
            raise SystemExit(OPTION_STATUS) from None
        raise


def _of_this_node(error: Exception) -> OptionError | StartError:
    import ray

    address = ray.util.get_node_ip_address()
    if isinstance(error, OptionError):
        return OptionError(f"on Ray node {address}: {error}")
    return StartError(f"the engine did not start: on Ray node {address}: {_reason(error)}")


def _reason(error: Exception) -> str:
    """In one line, as :class:`Failure` has it."""
    text = " ".join(str(error).split())
    if isinstance(error, OptionError):
        return text
    if isinstance(error, StartError):  # of a child's child; who raises it says this again
        return text.removeprefix("the engine did not start: ")
    return f"{type(error).__name__}: {text}"


def in_front_end(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls what waits for children.

    Raises:
        OptionError, StartError: because of what a child left.
        Exception: else what was raised.
    """
    try:
        return original(*args, **kwargs)
    except Exception as error:
        raise_known(error)
        raise


def while_serving(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a step; what ends the engine in a child is left for the front end.

    Raises:
        Exception: what was raised.
    """
    try:
        return original(*args, **kwargs)
    except Exception as error:
        if os.getpid() != _front_end:
            leave_failure(error)
        raise


def raise_known(error: Exception) -> None:
    """Raises what a child left, if one did; ``error``: what the front end knows of it."""
    global _told
    failure = known_failure()
    if failure is None:
        return
    _told = True
    if failure.is_option:
        raise OptionError(failure.reason) from None
    raise StartError(f"the engine did not start: {failure.reason}") from error


def tell(directory: Path) -> None:
    """Says at exit why a running engine ended, unless that was raised."""
    del directory
    failure = known_failure()
    if failure is not None and not _told:
        logger.error("MoE offload: the engine ended: %s", failure.reason)


def parse_args(original: Any, self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
    """FlexibleArgumentParser.parse_args: the command that was chosen tells errors in a line."""
    namespace = original(self, *args, **kwargs)
    command = getattr(namespace, "dispatch_function", None)
    if command is not None:
        namespace.dispatch_function = _with_one_line(command, self.prog)
    return namespace


def _with_one_line(command: Callable[[Any], Any], program: str) -> Callable[[Any], Any]:
    def run(arguments: argparse.Namespace) -> Any:
        try:
            return command(arguments)
        except (OptionError, StartError) as error:
            # Of a start, the child's traceback stands above.
            print(f"{program} {arguments.subparser}: error: {error}", file=sys.stderr)
            sys.exit(OPTION_STATUS if isinstance(error, OptionError) else START_STATUS)

    return run
