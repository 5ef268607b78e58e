"""The command line: ``python -m scripts.quantize MODEL OUT --format FORMAT``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from scripts.demo_model.architectures import DemoModelError
from scripts.quantize.layout import QuantizeError
from scripts.quantize.write import FORMATS, GROUP_SIZES, quantize


def build_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.quantize",
        description="Quantise a bfloat16 checkpoint into a layout that people serve.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="directory to read")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to write")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument(
        "--group-size",
        type=int,
        choices=GROUP_SIZES,
        default=128,
        help="inputs that share a scale, for int4, gptq and awq (default: 128)",
    )
    parser.add_argument(
        "--experts-only",
        action=argparse.BooleanOptionalAction,
        help="leave attention and all other networks as they are (default: unless fp8)",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace a checkpoint that is in OUT"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    began = time.perf_counter()
    try:
        quantize(
            args.model,
            args.out,
            args.format,
            group_size=args.group_size,
            experts_only=args.experts_only,
            force=args.force,
        )
    except (QuantizeError, DemoModelError, OSError) as error:
        parser.error(str(error))
    sizes = [sum(f.stat().st_size for f in d.iterdir()) for d in (args.model, args.out)]
    print(
        f"{args.out}: {args.format}, {sizes[1] / 1e9:.3f} GB of {sizes[0] / 1e9:.3f} GB, "
        f"written in {time.perf_counter() - began:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
