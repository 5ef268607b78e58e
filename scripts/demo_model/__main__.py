"""The command line: ``python -m scripts.demo_model OUT``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from scripts.demo_model.architectures import ARCHS, DemoModelError, Shape, expert_bytes
from scripts.demo_model.write import write_demo_model


def build_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.demo_model",
        description="Write a demo Mixture-of-Experts checkpoint, offline, from a seed.",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to write")
    parser.add_argument("--arch", choices=list(ARCHS), default="mixtral")
    parser.add_argument(
        "--experts-gb",
        type=float,
        metavar="X",
        help="GB (1e9 bytes) of expert weights, met within 10 %% (default: about 0.3)",
    )
    for field in fields(Shape):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=int,
            metavar="N",
            help=f"overrides the size's choice of {field.name.replace('_', '-')}",
        )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument(
        "--force", action="store_true", help="replace a checkpoint that is in OUT"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    started = time.perf_counter()
    try:
        shape = write_demo_model(
            args.out,
            args.arch,
            experts_gb=args.experts_gb,
            seed=args.seed,
            force=args.force,
            progress=sys.stderr.isatty(),
            **{field.name: getattr(args, field.name) for field in fields(Shape)},
        )
    except (DemoModelError, OSError) as error:
        parser.error(str(error))
    sizes = ", ".join(f"{field.name} {getattr(shape, field.name)}" for field in fields(Shape))
    print(
        f"{args.out}: {args.arch}, {sizes}; "
        f"{expert_bytes(args.arch, shape) / 1e9:.3f} GB of experts, "
        f"written in {time.perf_counter() - started:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
