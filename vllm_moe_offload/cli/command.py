"""What a subcommand is, and the errors it may raise."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class UsageError(ValueError):
    """An argument is wrong; the message names it, its value and what is allowed."""


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand.

    Attributes:
        path: its words, such as ``("trace", "show")``.
        help: one line.
        add_arguments: declares its arguments.
        run: does it; returns the exit status.
    """

    path: tuple[str, ...]
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def load_pyplot() -> Any:
    """matplotlib.pyplot without a display.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError(
            "--plot needs matplotlib: pip install 'vllm-moe-offload[plot]'"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
