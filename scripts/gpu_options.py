"""Command-line options that say which engines run on which model, for benchmark and profile."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.gpu_plan import (  # noqa: E402
    BACKENDS,
    FULL,
    MODELS,
    QUICK,
    TINY_MODELS,
    EngineChoices,
    Part,
    Sizes,
    parts_of,
    select_parts,
    sweep_of,
    with_layers,
    with_workloads,
)
from scripts.harness.options import add_common_options  # noqa: E402
from vllm_moe_offload.config import parse_cache_size  # noqa: E402


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Adds what says which engines run on which model."""
    parser.add_argument(
        "--parts", nargs="+", metavar="PART", help="default: all but those of misses"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int, help="layers of the models (default: see --list)")
    parser.add_argument(
        "--attention-backend", help="of all contestants (default: vLLM's choice)"
    )
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        help="of the compilation, for all contestants; eager: no Inductor (default: vLLM's choice)",
    )
    parser.add_argument(
        "--enforce-eager",
        action="store_true",
        help="no compilation and no graphs, for all contestants (always without a GPU, "
        "unless --backend is given)",
    )
    parser.add_argument(
        "--workloads",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(w.name for w in FULL.workloads)}; with --quick, of "
        f"{', '.join(w.name for w in QUICK.workloads)} (default: those of any topic for parts that "
        "ask what misses cost, else all others)",
    )
    parser.add_argument(
        "--host-gb",
        help='the plugin\'s host_gb: GiB, a share such as "100%%", or auto (default: auto)',
    )
    add_common_options(parser)


@dataclass(frozen=True, slots=True)
class Planned:
    """What the command line asks for.

    Attributes:
        all_sizes: with the workloads that were asked for, or all.
        are_chosen: whether workloads were asked for.
        max_positions: of the models' configs: a model serves any choice of workloads.
    """

    parts: list[Part]
    all_sizes: Sizes
    are_chosen: bool
    max_positions: int

    def sizes_of(self, part: Part) -> Sizes:
        """With the workloads to run in a part: if none were asked for, its own."""
        if self.are_chosen:
            return self.all_sizes
        workloads = (w for w in self.all_sizes.workloads if w.any_topic == part.is_sweep)
        return replace(self.all_sizes, workloads=tuple(workloads))


def planned(args: argparse.Namespace) -> Planned:
    """From :func:`add_plan_options`; makes ``args.work_dir`` absolute.

    Raises:
        ValueError: something that does not exist, or options that contradict each other.
    """
    args.work_dir = args.work_dir.absolute()
    is_tiny = args.quick or args.device == "cpu"
    of_size, all_sizes = (TINY_MODELS, QUICK) if is_tiny else (MODELS, FULL)
    models = [with_layers(model, args.layers) for model in of_size]
    parts = parts_of(models)
    if args.parts:
        parts = select_parts(args.parts, [*parts, *sweep_of(models)])
    check_choices(args)
    sizes = with_workloads(all_sizes, args.workloads)
    return Planned(parts, sizes, bool(args.workloads), positions_of(all_sizes))


def check_device(device: str) -> None:
    """Raises ValueError for a CUDA device that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"torch {torch.__version__} sees no CUDA device; --device cpu tries the harness alone"
        )


def positions_of(sizes: Sizes) -> int:
    """What the model's config allows: the longest request, and room."""
    return sizes.max_tokens + sizes.chunk_tokens


def choices_of(args: argparse.Namespace) -> EngineChoices:
    """What the command line says about all engines."""
    return EngineChoices(
        device=args.device,
        attention_backend=args.attention_backend,
        backend=args.backend,
        enforce_eager=args.enforce_eager,
        host_gb=args.host_gb,
    )


def check_choices(args: argparse.Namespace) -> None:
    """Raises ValueError for options that contradict each other, or a size that is none."""
    if args.backend is not None and args.enforce_eager:
        raise ValueError(
            f"--backend {args.backend} and --enforce-eager: the latter compiles nothing; give one"
        )
    if args.host_gb is None:
        return
    if args.device != "cuda":
        raise ValueError(f"--host-gb {args.host_gb}: only with --device cuda; see cache_gb")
    try:
        parse_cache_size(args.host_gb)
    except ValueError as error:
        raise ValueError(f"--host-gb {args.host_gb}: {error}") from error
