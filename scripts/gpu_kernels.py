"""The kernels of a cache that the GPU plans, alone: do they follow the rule, how long do they plan?

    python scripts/gpu_kernels.py [--device cuda] [--least-calls 1000]

Needs torch and Triton, and no vLLM. Random calls go to the kernels and to the rule in numpy
(tests/device/kernels/harness.py); after each, state, log and the bytes in all slots are compared,
bit by bit. Then the planner alone is timed in a captured graph, by misses and slots. Each finding is
a line of JSON (scripts/gpu_findings.py).

With ``--device cpu`` Triton's interpreter runs the kernels in tiny sizes: that tries the script. It
says so and does nothing where Triton is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.gpu_findings import note  # noqa: E402

if TYPE_CHECKING:
    from tests.device.kernels.harness import Shape
    from vllm_moe_offload.device.cache import DeviceCache
    from vllm_moe_offload.device.tokens import LayerTokens

MISSES = (0, 1, 2, 8, 24, 96)
SLOTS = (1536, 6144)
EXPERTS, TOP_K = 128, 8
LAYERS_PER_SLOT = 4 / EXPERTS
"""So many layers that a quarter of their experts have a slot."""
CALLS_IN_GRAPH = 100
REPEATS = 21


# ---- the rule --------------------------------------------------------------------------


def shapes(device: str) -> list[Shape]:
    """Of the random calls: every way through the kernels, at sizes of models."""
    import numpy as np

    from tests.device.kernels.harness import Shape

    if device == "cpu":
        return [Shape(2, 6, 2, 9, 3), Shape(2, 6, 2, 4, 20, "-1", 2)]
    return [
        Shape(48, 128, 8, 1536, 8),
        Shape(4, 128, 8, 200, 64),
        Shape(3, 8, 2, 12, 30, "-1"),
        Shape(3, 8, 2, 5, 30),  # waves
        Shape(4, 128, 8, 200, 64, "-1", 2, np.int64),
        Shape(2, 60, 4, 70, 120),
        Shape(2, 384, 8, 700, 8),
        Shape(2, 1024, 4, 1100, 300),
        Shape(2, 8, 4, 12, 30, kind="any"),
        Shape(60, 256, 8, 6144, 8),
    ]


def compare(device: str, least_calls: int) -> bool:
    """Whether the kernels do what the rule says, in at least so many calls."""
    import torch

    from tests.device.kernels.harness import LARGE_TENSORS, LAYOUT, Comparison
    from vllm_moe_offload.device import cache

    chosen = shapes(device)
    calls_each = -(-least_calls // len(chosen))
    num_calls, all_equal = 0, True
    for number, shape in enumerate(chosen):
        began = time.perf_counter()
        layout = LARGE_TENSORS if shape.num_slots < 100 and device != "cpu" else LAYOUT
        comparison = Comparison(cache, shape, layout, torch.device(device))
        reason = None
        try:
            comparison.run(seed=number, num_steps=-(-calls_each // shape.num_layers))
        except AssertionError as error:
            reason = str(error)[:500] or "differs"
        num_calls += comparison.num_calls
        all_equal = all_equal and reason is None
        note(
            "calls of a shape",
            shape=str(shape),
            calls=comparison.num_calls,
            hits=comparison.pool.hits,
            misses=comparison.pool.misses,
            reason=reason,
            seconds=round(time.perf_counter() - began, 2),
        )
    note("rule", equal=all_equal, calls=num_calls)
    return all_equal


# ---- planning --------------------------------------------------------------------------


def filled_cache(num_slots: int, num_hits: int, device: str) -> DeviceCache:
    """A full cache in which ``num_hits`` experts of layer 0 have slots, the first ones."""
    import torch

    from vllm_moe_offload.cache.layout import ExpertLayout, TensorSpec
    from vllm_moe_offload.device.cache import DeviceCache

    cache = DeviceCache(
        num_layers=int(LAYERS_PER_SLOT * num_slots),
        num_experts=EXPERTS,
        num_slots=num_slots,
        top_k=TOP_K,
        max_tokens=EXPERTS,
        device=torch.device(device),
    )
    layout = ExpertLayout((TensorSpec("w", (8,), "bfloat16", 16),))
    records = torch.zeros(cache.num_layers * EXPERTS, layout.record_bytes, dtype=torch.uint8)
    slots = {"w": torch.zeros(num_slots, 16, dtype=torch.uint8, device=device)}
    cache.attach(layout, slots, records.pin_memory() if device == "cuda" else records)
    cache.live.fill_(1)
    for layer in range(1, cache.num_layers):
        cache.bring(layer, call_of(range(EXPERTS), device))
    if num_hits:
        cache.bring(0, call_of(range(num_hits), device))
    return cache


def call_of(experts: range, device: str) -> LayerTokens:
    """A call that needs these experts; the last token may name one of them again and again."""
    import torch

    from vllm_moe_offload.device.rule import VOTE_ONE
    from vllm_moe_offload.device.tokens import LayerTokens

    num_tokens = -(-len(experts) // TOP_K)
    ids = torch.full((num_tokens * TOP_K,), experts[-1], dtype=torch.int32)
    ids[: len(experts)] = torch.tensor(experts, dtype=torch.int32)
    return LayerTokens(
        ids.view(num_tokens, TOP_K).to(device),
        torch.zeros(num_tokens, dtype=torch.bool, device=device),
        torch.full((num_tokens,), VOTE_ONE // num_tokens, dtype=torch.int32, device=device),
    )


def plan_times_s(num_slots: int, num_misses: int, device: str, repeats: int) -> dict[str, Any]:
    """How long the planner takes for a call with so many misses; the rest of it hits.

    A plan changes what the next one finds, so its state is put back before each; how long that takes
    alone is subtracted.
    """
    import torch

    from scripts.gpu_timing import call_times_s

    num_hits = TOP_K - num_misses if num_misses < TOP_K else 0
    cache = filled_cache(num_slots, num_hits, device)
    tokens = call_of(range(num_hits + num_misses), device)
    state = [cache.slot_of, cache.owner, cache.slot_score, cache.score]
    before = [tensor.clone() for tensor in state]

    def restore() -> None:
        torch._foreach_copy_(state, before)

    def restore_and_plan() -> None:
        restore()
        cache._plan(0, tokens, cache._need_of(0, tokens))

    restore_and_plan()
    missed = int(cache._num_pairs)
    if missed != num_misses:
        raise RuntimeError(f"{num_misses} misses were to be planned, and {missed} were")
    calls = CALLS_IN_GRAPH if device == "cuda" else 1
    both, alone = (
        call_times_s([launch] * calls, device, repeats)
        for launch in (restore_and_plan, restore)
    )
    return {
        "slots": num_slots,
        "misses": num_misses,
        "median_us": round(1e6 * (statistics.median(both) - statistics.median(alone)), 3),
        "with_restoring_us": [round(1e6 * seconds, 3) for seconds in both],
        "restoring_us": [round(1e6 * seconds, 3) for seconds in alone],
    }


def main() -> int:
    """Exit status 0 if the kernels follow the rule, or cannot be tried here."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--least-calls",
        type=int,
        default=1000,
        help="random calls to compare (default: %(default)s)",
    )
    args = parser.parse_args()
    if args.device == "cpu":
        if importlib.util.find_spec("triton") is None:
            note("rule", left_out="not rehearsed: Triton is missing")
            return 0
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    equal = compare(args.device, args.least_calls)
    cells = list(itertools.product(SLOTS, MISSES))
    repeats = REPEATS
    if args.device == "cpu":
        cells, repeats = [(256, 1), (256, 24)], 1
    for num_slots, num_misses in cells:
        note("plan", **plan_times_s(num_slots, num_misses, args.device, repeats))
    return int(not equal)


if __name__ == "__main__":
    sys.exit(main())
