"""How fast experts cross from page-locked host memory to a CUDA device: gathered, and copied.

    python scripts/gpu_link.py --record-bytes 9437184 [--lock-gb 20] [--sweep]

Needs torch and Triton, and no vLLM. Host memory is touched and page-locked as a start does it, which
is timed; records are chosen at random in all of it and in a gigabyte of it. The gather is launched in
a captured graph as the plugin launches it; with ``--sweep`` by other numbers of records and programs
too, and beside a matrix product on another stream. ``copy engine``: torch's non-blocking copies, one
per record. Each finding is a line of JSON (scripts/gpu_findings.py), all of them together the last:
``gather_bytes_per_s`` is what the plugin's own launch reaches, ``bytes_per_s`` the most of all.

With ``--device cpu`` memory is not locked and Triton's interpreter copies within RAM, if there is
Triton: that tries the script.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from scripts.gpu_findings import note  # noqa: E402
from scripts.gpu_probe import memory  # noqa: E402
from scripts.gpu_timing import Launch, call_times_s, side_by_side_s  # noqa: E402
from vllm_moe_offload.cache.layout import ALIGNMENT  # noqa: E402

GIB = 1 << 30
DEFAULT_LOCK_GB = 2.0
NARROW_BYTES = GIB
"""Of the host memory that records are chosen in, beside all of it."""
ROUND_BYTES = GIB
"""Copied in a repeat."""
REPEATS = 5
RECORDS = (1, 2, 4, 8, 16, 32, 96)
PROGRAMS = (8, 16, 32, 64, 128)
BESIDE_PROGRAMS = (8, 32, 128)
TOUCH_THREADS = 8
MATRIX_ROWS = 8192


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a run measures with; a CPU tries it with less."""

    round_bytes: int = ROUND_BYTES
    narrow_bytes: int = NARROW_BYTES
    repeats: int = REPEATS
    records: tuple[int, ...] = RECORDS
    programs: tuple[int, ...] = PROGRAMS


ON_CPU = Sizes(
    round_bytes=1 << 18, narrow_bytes=1 << 18, repeats=2, records=(1, 4), programs=(8, 16)
)


# ---- host memory -----------------------------------------------------------------------


class HostRecords:
    """Host memory full of records, page-locked for a CUDA device.

    Attributes:
        rows: uint8 ``[records, record bytes]``.
        told: sizes and seconds.
    """

    def __init__(self, record_bytes: int, nbytes: int, device: str) -> None:
        from vllm_moe_offload.store.direct_io import aligned_buffer
        from vllm_moe_offload.transfer.page_lock import PageLocked

        available = memory()["MemAvailable"]
        count = max(2, min(nbytes, available // 2) // record_bytes)
        arena = aligned_buffer(count * record_bytes)
        self.told: dict[str, Any] = {
            "bytes": arena.nbytes,
            "available_bytes_before": available,
            "touch_threads": TOUCH_THREADS,
            "touch_s": _touch(arena),
        }
        self._locked: PageLocked | None = None
        if device == "cuda":
            torch.zeros(1, device=device)  # the driver is up: its seconds are not the lock's
            began = time.perf_counter()
            self._locked = PageLocked(arena)
            self.told["lock_s"] = time.perf_counter() - began
        self.rows = torch.from_numpy(arena).view(count, record_bytes)

    def close(self) -> None:
        """Unlocks the memory, and says how long that took."""
        if self._locked is None:
            return
        began = time.perf_counter()
        self._locked.close()
        self.told["unlock_s"] = time.perf_counter() - began


def _touch(arena: Any) -> float:
    """Seconds to write all of it, with several threads as a start does."""
    part = -(-arena.nbytes // TOUCH_THREADS)
    threads = [
        threading.Thread(target=arena[begin : begin + part].fill, args=(1,))
        for begin in range(0, arena.nbytes, part)
    ]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


# ---- copies ----------------------------------------------------------------------------


def copies_in_a_round(record_bytes: int, at_once: int, sizes: Sizes) -> int:
    """How many copies of so many records fill a round."""
    return max(1, sizes.round_bytes // (record_bytes * at_once))


class Gather:
    """``device.kernels.gather`` into as many slots as it is to fill at once.

    A record is two tensors, of as many bytes as gate and up projection have, and as the down
    projection has.
    """

    def __init__(self, host: HostRecords, most_records: int, device: str) -> None:
        from vllm_moe_offload.cache.layout import ExpertLayout, TensorSpec
        from vllm_moe_offload.device.cache import DeviceCache

        record_bytes = host.rows.shape[1]
        down_bytes = record_bytes // 3 // 16 * 16
        sizes = {"w13_weight": record_bytes - down_bytes, "w2_weight": down_bytes}
        layout = ExpertLayout(
            tuple(TensorSpec(name, (size,), "uint8", size) for name, size in sizes.items())
        )
        self.slots = {
            name: torch.zeros(most_records, size, dtype=torch.uint8, device=device)
            for name, size in sizes.items()
        }
        self.num_host_records = len(host.rows)
        self._device = device
        cache = DeviceCache(
            num_layers=1,
            num_experts=self.num_host_records,
            num_slots=most_records,
            top_k=1,
            max_tokens=1,
            device=torch.device(device),
        )
        cache.attach(layout, self.slots, host.rows)
        assert cache._copies is not None
        self._copies = cache._copies

    def launch(self, pairs: torch.Tensor, num_pairs: torch.Tensor, programs: int) -> None:
        """As ``DeviceCache`` launches it, but for the number of programs."""
        from vllm_moe_offload.device import cache, kernels

        kernels.gather[(programs,)](
            pairs,
            num_pairs,
            self._copies.records,
            self._copies.tensors,
            self._copies.record_bytes,
            self._copies.num_blocks,
            TENSORS=self._copies.tensors.shape[0],
            PROGRAMS=programs,
            BLOCK_BYTES=cache.GATHER_BLOCK_BYTES,
            num_warps=8,
        )

    def launches(self, at_once: int, span: int, programs: int, calls: int) -> list[Launch]:
        """So many calls, each of other records among the first ``span``."""
        rng = torch.Generator().manual_seed(0)
        num_pairs = torch.full((1,), at_once, dtype=torch.int32, device=self._device)
        found: list[Launch] = []
        for _ in range(calls):
            records = torch.randint(span, (at_once,), generator=rng, dtype=torch.int32)
            pairs = torch.stack([records, torch.arange(at_once, dtype=torch.int32)], 1)
            found.append(partial(self.launch, pairs.to(self._device), num_pairs, programs))
        return found

    def check(self) -> None:
        """Raises RuntimeError unless every slot is full of what host memory is full of."""
        wrong = [name for name, rows in self.slots.items() if not bool((rows == 1).all())]
        if wrong:
            raise RuntimeError(f"gather left other bytes than it copied in {wrong}")


def gather_rates(
    gather: Gather,
    record_bytes: int,
    cells: list[tuple[int, int, int]],
    sizes: Sizes,
    device: str,
) -> list[dict[str, Any]]:
    """Bytes per second of each cell: records at once, records they are chosen from, programs."""
    found = []
    for at_once, span, programs in cells:
        calls = copies_in_a_round(record_bytes, at_once, sizes)
        seconds = call_times_s(
            gather.launches(at_once, span, programs, calls), device, sizes.repeats
        )
        rates = [at_once * record_bytes / value for value in seconds]
        cell = {
            "records": at_once,
            "programs": programs,
            "of_bytes": span * record_bytes,
            "median_bytes_per_s": statistics.median(rates),
            "samples_bytes_per_s": rates,
        }
        note("gather", **cell)
        found.append(cell)
    return found


def copy_engine_rates(host: HostRecords, sizes: Sizes, device: str) -> list[float]:
    """Bytes per second of torch's copies of one record each, a value per repeat."""
    num_records, record_bytes = host.rows.shape
    calls = copies_in_a_round(record_bytes, 1, sizes)
    target = torch.empty(min(calls, 96), record_bytes, dtype=torch.uint8, device=device)
    rng = torch.Generator().manual_seed(0)
    chosen = torch.randint(num_records, (calls,), generator=rng).tolist()

    def copy() -> None:
        for index, record in enumerate(chosen):
            target[index % len(target)].copy_(host.rows[record], non_blocking=True)

    found = []
    for repeat in range(sizes.repeats + 1):
        if device == "cuda":
            (seconds,) = side_by_side_s([copy])
        else:
            began = time.perf_counter()
            copy()
            seconds = time.perf_counter() - began
        if repeat:
            found.append(calls * record_bytes / seconds)
    return found


def beside_a_product(
    gather: Gather, record_bytes: int, at_once: int, programs: int, sizes: Sizes
) -> dict[str, Any]:
    """How much a gather and a matrix product slow each other down, on streams of their own."""
    calls = 2 * copies_in_a_round(record_bytes, at_once, sizes)
    launches = gather.launches(at_once, gather.num_host_records, programs, calls)
    left = torch.randn(MATRIX_ROWS, MATRIX_ROWS, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(left)

    def copy() -> None:
        for launch in launches:
            launch()

    def multiply(times: int) -> None:
        for _ in range(times):
            torch.mm(left, left, out=out)

    side_by_side_s([copy, partial(multiply, 1)])  # warms up
    copy_s = statistics.median(side_by_side_s([copy])[0] for _ in range(sizes.repeats))
    one_s = side_by_side_s([partial(multiply, 10)])[0] / 10
    times = max(1, round(copy_s / one_s))  # both take as long
    product_s = statistics.median(
        side_by_side_s([partial(multiply, times)])[0] for _ in range(sizes.repeats)
    )
    together = [side_by_side_s([copy, partial(multiply, times)]) for _ in range(sizes.repeats)]
    return {
        "programs": programs,
        "records": at_once,
        "gather_alone_s": copy_s,
        "product_alone_s": product_s,
        "gather_slowdown": statistics.median(row[0] for row in together) / copy_s,
        "product_slowdown": statistics.median(row[1] for row in together) / product_s,
    }


# ---- all of it -------------------------------------------------------------------------


def cells_of(
    record_bytes: int, num_host_records: int, sizes: Sizes, own_programs: int, *, sweep: bool
) -> list[tuple[int, int, int]]:
    """What the gather is measured with, the plugin's own launch first."""
    most = [n for n in sizes.records if n * record_bytes <= sizes.round_bytes] or [1]
    own = (most[-1], num_host_records, own_programs)
    if not sweep:
        return [own]
    narrow = max(2, min(num_host_records, sizes.narrow_bytes // record_bytes))
    spans = dict.fromkeys((num_host_records, narrow))
    cells = itertools.product(most, spans, dict.fromkeys((*sizes.programs, own_programs)))
    return list(dict.fromkeys([own, *cells]))


def measure(args: argparse.Namespace, sizes: Sizes) -> dict[str, Any]:
    """All that was asked for."""
    host = HostRecords(args.record_bytes, int(args.lock_gb * GIB), args.device)
    note("locked", **host.told)
    engine = copy_engine_rates(host, sizes, args.device)
    note("copy engine", median_bytes_per_s=statistics.median(engine))
    result: dict[str, Any] = {
        "device": device_name(args.device),
        "record_bytes": args.record_bytes,
        "locked": host.told,
        "copy_engine_bytes_per_s": statistics.median(engine),
        "copy_engine_samples_bytes_per_s": engine,
        "gather": [],
        "beside_a_product": [],
    }
    if args.device == "cpu" and importlib.util.find_spec("triton") is None:
        note("gather", left_out="not rehearsed: Triton is missing")
    else:
        result |= _with_gather(args, sizes, host)
    host.close()
    rates = [cell["median_bytes_per_s"] for cell in result["gather"]]
    return result | {"bytes_per_s": max([result["copy_engine_bytes_per_s"], *rates])}


def _with_gather(args: argparse.Namespace, sizes: Sizes, host: HostRecords) -> dict[str, Any]:
    from vllm_moe_offload.device.cache import GATHER_PROGRAMS

    cells = cells_of(
        args.record_bytes, len(host.rows), sizes, GATHER_PROGRAMS, sweep=args.sweep
    )
    most = max(at_once for at_once, _, _ in cells)
    gather = Gather(host, most, args.device)
    rates = gather_rates(gather, args.record_bytes, cells, sizes, args.device)
    gather.check()
    beside = []
    for programs in BESIDE_PROGRAMS if args.sweep and args.device == "cuda" else ():
        beside.append(beside_a_product(gather, args.record_bytes, most, programs, sizes))
        note("beside a product", **beside[-1])
    return {
        "gather": rates,
        "gather_bytes_per_s": rates[0]["median_bytes_per_s"],
        "beside_a_product": beside,
    }


def device_name(device: str) -> str:
    """Of the GPU, or that there is none."""
    return torch.cuda.get_device_name() if device == "cuda" else "RAM to RAM"


def main() -> int:
    """Exit status 1 without a device; 2 for wrong arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record-bytes", type=int, required=True, help="of one expert")
    parser.add_argument(
        "--lock-gb",
        type=float,
        default=DEFAULT_LOCK_GB,
        help="host memory to page-lock, half of what is available at most (default: %(default)s)",
    )
    parser.add_argument("--sweep", action="store_true", help="all numbers, and the product")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    if args.record_bytes < 1 or args.record_bytes % ALIGNMENT:
        parser.error(
            f"--record-bytes {args.record_bytes}: allowed are multiples of {ALIGNMENT}, as in a store"
        )
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 1
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    note("link", **measure(args, ON_CPU if args.device == "cpu" else Sizes()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
