"""Records the routing of forty short requests, served by vLLM with the plugin.

    python -m scripts.upcycle --out MODEL
    python scripts/record_routing.py MODEL TRACE.npz --concurrency 4

The requests are those of ``scripts/upcycle/prompts.py`` in the model's chat template, decoded
greedily; half of all experts are cached. What is cached has no influence on the routing.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.upcycle.prompts import prompts  # noqa: E402
from vllm_moe_offload.config import MODES  # noqa: E402

KV_CACHE_BYTES = 256 << 20
SHOWN = 3
"""Answers that are printed, so that one sees whether the model speaks."""


def build_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="checkpoint with a chat template")
    parser.add_argument("trace", type=Path, help="the .npz to write")
    parser.add_argument("--concurrency", type=int, default=1, help="requests at a time")
    parser.add_argument(
        "--max-tokens", type=int, default=64, help="most generated tokens per request"
    )
    parser.add_argument("--mode", default="lrfu", help="of the plugin (default: lrfu)")
    parser.add_argument(
        "--store-dir", type=Path, help="keeps the expert store (default: thrown away)"
    )
    return parser


def record(args: argparse.Namespace, store: Path) -> list[str]:
    """Serves all requests and writes the trace; the answers."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        str(args.model),
        max_model_len=512,
        max_num_seqs=args.concurrency,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        enforce_eager=True,
        enable_prefix_caching=False,
        additional_config={
            "moe_offload": {
                "mode": args.mode,
                "cache_gb": "50%",
                "store_dir": str(store),
                "record_trace": str(args.trace.absolute()),
            }
        },
    )
    try:
        messages = [[{"role": "user", "content": prompt}] for prompt in prompts()]
        options = SamplingParams(temperature=0.0, max_tokens=args.max_tokens)
        answers = llm.chat(messages, options, use_tqdm=sys.stderr.isatty())
        return [answer.outputs[0].text for answer in answers]
    finally:
        llm.llm_engine.engine_core.shutdown()  # which writes the trace
        cleanup_dist_env_and_memory()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if not (args.model / "config.json").exists():
        parser.error(f"{args.model} is no checkpoint; see python -m scripts.upcycle --help")
    if args.concurrency < 1:
        parser.error(f"concurrency must be at least 1, got {args.concurrency}")
    if args.trace.suffix != ".npz":
        parser.error(f"the trace must end in .npz, got {args.trace}")
    if not args.trace.absolute().parent.is_dir():
        parser.error(f"{args.trace.parent} is no directory")
    if args.mode not in MODES[1:]:
        parser.error(f"mode is {args.mode!r}; allowed: {', '.join(MODES[1:])}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    with tempfile.TemporaryDirectory() as temporary:
        answers = record(args, args.store_dir or Path(temporary))
    for prompt, answer in list(zip(prompts(), answers, strict=True))[:SHOWN]:
        print(f"> {prompt}\n{answer}\n")
    print(f"{args.trace}: {args.trace.stat().st_size / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
