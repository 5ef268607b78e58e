"""Bandwidth from page-locked host memory to a CUDA device, in copies of one expert each.

    python scripts/gpu_link.py --record-bytes 9437184

Prints a line of JSON. ``torch``: one non-blocking copy per record on a stream of its own, without
the plugin; ``memcpy``: the plugin's copier with cudaMemcpyAsync, two tensors a record; ``gather``:
its kernel, whose threads read host memory themselves. ``bytes_per_s`` is the greatest of the
medians: what the link gives, for a bound.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_moe_offload.transfer.cuda import CopyEngine

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

ROUND_BYTES = 1 << 30
REPEATS = 9
ENGINES: tuple[CopyEngine, ...] = ("memcpy", "gather")


def torch_bytes_per_s(record_bytes: int) -> list[float]:
    """Copies of records that lie apart, about a GiB per round; a value per round."""
    import torch

    count = max(2, ROUND_BYTES // record_bytes)
    source = torch.empty((count, record_bytes), dtype=torch.uint8, pin_memory=True)
    source.fill_(1)
    target = torch.empty_like(source, device="cuda")
    stream = torch.cuda.Stream()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    found = []
    for repeat in range(REPEATS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            begin.record(stream)
            for row, source_row in enumerate(order):
                target[row].copy_(source[source_row], non_blocking=True)
            end.record(stream)
        stream.synchronize()
        if repeat:
            found.append(count * record_bytes / (begin.elapsed_time(end) / 1e3))
    return found


def copier_bytes_per_s(record_bytes: int, engine: CopyEngine) -> list[float]:
    """The same by the plugin's copier, all records of a round in one call."""
    import torch

    from vllm_moe_offload.layout import ExpertLayout, TensorSpec
    from vllm_moe_offload.pool import SlotPool
    from vllm_moe_offload.store.direct_io import aligned_buffer
    from vllm_moe_offload.transfer.copier import DEMAND_LANE
    from vllm_moe_offload.transfer.cuda import CudaCopier

    # As many bytes as gate and up projection have, and as the down projection has.
    down_bytes = record_bytes // 3 // 16 * 16
    sizes = {"w13_weight": record_bytes - down_bytes, "w2_weight": down_bytes}
    layout = ExpertLayout(
        tuple(TensorSpec(name, (size,), "uint8", size) for name, size in sizes.items())
    )
    count = max(2, ROUND_BYTES // record_bytes)
    pool = SlotPool(layout, count, device=torch.device("cuda", torch.cuda.current_device()))
    arena = aligned_buffer(count * layout.record_bytes).reshape(count, layout.record_bytes)
    arena.fill(1)
    copier = CudaCopier(
        pool,
        arena,
        compute_stream=lambda: torch.cuda.current_stream().cuda_stream,
        engine=engine,
    )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    pairs = list(zip(order, range(count), strict=True))
    found = []
    try:
        for repeat in range(REPEATS + 1):
            torch.cuda.synchronize()
            began = time.perf_counter()
            ticket = copier.copy(DEMAND_LANE, pairs)
            copier.wait_on_host(ticket)
            seconds = time.perf_counter() - began
            copier.release(ticket)
            if repeat:
                found.append(count * record_bytes / seconds)
        wrong = [name for name, rows in pool.tensors.items() if not bool((rows == 1).all())]
        if wrong:
            raise RuntimeError(f"{engine} left other bytes than it copied in {wrong}")
    finally:
        copier.close()
    return found


def main() -> int:
    """Exit status 1 without a device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record-bytes", type=int, required=True, help="of one expert")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 1
    samples: dict[str, list[float]] = {"torch": torch_bytes_per_s(args.record_bytes)}
    errors: dict[str, str] = {}
    for engine in ENGINES:
        try:
            samples[engine] = copier_bytes_per_s(args.record_bytes, engine)
        except (ImportError, RuntimeError) as error:  # the link can be measured without it
            errors[engine] = str(error)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    result = {
        "device": torch.cuda.get_device_name(),
        "record_bytes": args.record_bytes,
        "samples_bytes_per_s": samples,
        "medians_bytes_per_s": medians,
        "errors": errors,
        "bytes_per_s": max(medians.values()),
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
