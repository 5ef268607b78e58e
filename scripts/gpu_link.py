"""Bandwidth from page-locked host memory to a CUDA device, in copies of one expert each.

    python scripts/gpu_link.py --record-bytes 9437184 [--lock-gb 20]

Prints a line of JSON per finding (scripts/gpu_findings.py) and all of it as the last one. ``torch``:
one non-blocking copy per record on a stream of its own, without the plugin; ``memcpy``: the plugin's
copier with cudaMemcpyAsync, two tensors a record; ``gather``: its kernel, whose threads read host
memory themselves. ``bytes_per_s`` is the greatest of the medians: what the link gives, for a bound.
``--lock-gb`` asks how long it takes to touch and to page-lock so much memory, as a start does.

With ``--device cpu`` records are copied within RAM, by torch alone: that tries the script.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_moe_offload.transfer.cuda import CopyEngine

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.gpu_findings import note  # noqa: E402

ROUND_BYTES = 1 << 30
REPEATS = 9
ENGINES: tuple[CopyEngine, ...] = ("memcpy", "gather")
TOUCH_THREADS = 8
GIB = 1 << 30


def records_of(record_bytes: int, round_bytes: int) -> int:
    """How many are copied in a round."""
    return max(2, round_bytes // record_bytes)


def shuffled(count: int) -> list[int]:
    """Records lie apart, in host memory and on the device."""
    import torch

    return torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()


def torch_bytes_per_s(record_bytes: int, round_bytes: int, device: str) -> list[float]:
    """Copies of records that lie apart; a value per round."""
    import torch

    count = records_of(record_bytes, round_bytes)
    on_gpu = device == "cuda"
    source = torch.empty((count, record_bytes), dtype=torch.uint8, pin_memory=on_gpu)
    source.fill_(1)
    target = torch.empty_like(source, device=device)
    order = shuffled(count)

    def copy() -> None:
        for row, source_row in enumerate(order):
            target[row].copy_(source[source_row], non_blocking=True)

    found = []
    for repeat in range(REPEATS + 1):
        seconds = _on_stream(copy) if on_gpu else _timed(copy)
        if repeat:
            found.append(count * record_bytes / seconds)
    return found


def _timed(copy: Any) -> float:
    began = time.perf_counter()
    copy()
    return time.perf_counter() - began


def _on_stream(copy: Any) -> float:
    """Seconds of device time on a stream of its own."""
    import torch

    stream = torch.cuda.Stream()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        begin.record(stream)
        copy()
        end.record(stream)
    stream.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def copier_bytes_per_s(
    record_bytes: int, round_bytes: int, engine: CopyEngine
) -> dict[str, list[float]]:
    """The same by the plugin's copier, all records of a round in one call, and one a call."""
    import torch

    from vllm_moe_offload.cache.layout import ExpertLayout, TensorSpec
    from vllm_moe_offload.cache.pool import SlotPool
    from vllm_moe_offload.store.direct_io import aligned_buffer
    from vllm_moe_offload.transfer.copier import DEMAND_LANE
    from vllm_moe_offload.transfer.cuda import CudaCopier

    # As many bytes as gate and up projection have, and as the down projection has.
    down_bytes = record_bytes // 3 // 16 * 16
    sizes = {"w13_weight": record_bytes - down_bytes, "w2_weight": down_bytes}
    layout = ExpertLayout(
        tuple(TensorSpec(name, (size,), "uint8", size) for name, size in sizes.items())
    )
    count = records_of(record_bytes, round_bytes)
    pool = SlotPool(layout, count, device=torch.device("cuda", torch.cuda.current_device()))
    arena = aligned_buffer(count * layout.record_bytes).reshape(count, layout.record_bytes)
    arena.fill(1)
    copier = CudaCopier(
        pool,
        arena,
        compute_stream=lambda: torch.cuda.current_stream().cuda_stream,
        engine=engine,
    )
    pairs = list(zip(shuffled(count), range(count), strict=True))
    found: dict[str, list[float]] = {engine: [], f"{engine}, one at a time": []}
    try:
        for repeat in range(REPEATS + 1):
            for name, calls in zip(found, ([pairs], [[pair] for pair in pairs]), strict=True):
                torch.cuda.synchronize()
                began = time.perf_counter()
                for call in calls:
                    ticket = copier.copy(DEMAND_LANE, call)
                    copier.wait_on_host(ticket)
                    copier.release(ticket)
                seconds = time.perf_counter() - began
                if repeat:
                    found[name].append(count * record_bytes / seconds)
        wrong = [name for name, rows in pool.tensors.items() if not bool((rows == 1).all())]
        if wrong:
            raise RuntimeError(f"{engine} left other bytes than it copied in {wrong}")
    finally:
        copier.close()
    return found


def lock(gigabytes: float, device: str) -> dict[str, Any]:
    """How long it takes to touch and to page-lock memory; less where less is available."""
    import psutil

    from vllm_moe_offload.store.direct_io import aligned_buffer

    wanted, available = int(gigabytes * GIB), psutil.virtual_memory().available
    nbytes = min(wanted, available // 2) // GIB * GIB or min(wanted, available // 4)
    buffer = aligned_buffer(nbytes)
    part = -(-nbytes // TOUCH_THREADS)
    threads = [
        threading.Thread(target=buffer[begin : begin + part].fill, args=(1,))
        for begin in range(0, nbytes, part)
    ]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found: dict[str, Any] = {
        "bytes": nbytes,
        "available_bytes_before": available,
        "touch_threads": len(threads),
        "touch_s": time.perf_counter() - began,
    }
    if device == "cuda":
        import torch

        runtime = torch.cuda.cudart()
        for name, call in (
            ("lock", lambda: runtime.cudaHostRegister(buffer.ctypes.data, nbytes, 0)),
            ("unlock", lambda: runtime.cudaHostUnregister(buffer.ctypes.data)),
        ):
            began = time.perf_counter()
            status = int(call())
            found[f"{name}_s"] = time.perf_counter() - began
            if status:
                found["error"] = f"cudaHostRegister: {name}: error {status}"
                break
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All that was asked for; what cannot be measured has its error."""
    samples: dict[str, list[float]] = {}
    errors: dict[str, str] = {}
    samples["torch"] = torch_bytes_per_s(args.record_bytes, args.round_bytes, args.device)
    note("torch", median_bytes_per_s=statistics.median(samples["torch"]))
    for engine in ENGINES if args.device == "cuda" else ():
        try:
            samples |= copier_bytes_per_s(args.record_bytes, args.round_bytes, engine)
        except (ImportError, RuntimeError) as error:  # the link can be measured without it
            errors[engine] = str(error)
            note(engine, error=str(error))
        else:
            note(engine, median_bytes_per_s=statistics.median(samples[engine]))
    result: dict[str, Any] = {}
    if args.lock_gb:
        result["locked"] = lock(args.lock_gb, args.device)
        note("locked", **result["locked"])
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return result | {
        "device": device_name(args.device),
        "record_bytes": args.record_bytes,
        "samples_bytes_per_s": samples,
        "medians_bytes_per_s": medians,
        "errors": errors,
        "bytes_per_s": max(medians.values()),
    }


def device_name(device: str) -> str:
    """Of the GPU, or that there is none."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "RAM to RAM"


def main() -> int:
    """Exit status 1 without a device, or where the copier failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record-bytes", type=int, required=True, help="of one expert")
    parser.add_argument("--round-bytes", type=int, default=ROUND_BYTES, help="of one repeat")
    parser.add_argument("--lock-gb", type=float, default=0, help="host memory to page-lock")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 1
    result = measure(args)
    note("link", **result)
    return int(bool(result["errors"]))


if __name__ == "__main__":
    sys.exit(main())
