"""Bandwidth from page-locked host memory to a CUDA device, in copies of one expert each.

    python scripts/gpu_link.py --record-bytes 9437184

Prints a line of JSON. ``memcpy``: cudaMemcpyAsync on a stream of its own, record after record,
as the plugin copies; ``gather``: the plugin's kernel, whose threads read host memory themselves.
``bytes_per_s`` is the greater of both medians: what the link gives, for a bound.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

ROUND_BYTES = 1 << 30
REPEATS = 9


def memcpy_bytes_per_s(record_bytes: int) -> list[float]:
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
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "record_bytes": args.record_bytes,
        "memcpy_bytes_per_s": memcpy_bytes_per_s(args.record_bytes),
    }
    medians = [statistics.median(result["memcpy_bytes_per_s"])]
    print(json.dumps(result | {"bytes_per_s": max(medians)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
