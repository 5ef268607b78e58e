"""Demand misses run at the disk: TransferEngine against raw O_DIRECT reads.

Batches of records, picked at random from a store of random bytes, are read through a
TransferEngine into the rows of a SlotPool, as a layer call with misses does, and with plain
`preadv` by as many C threads into page-aligned buffers. Kinds of reads and sizes of batches
take turns within every repeat, and a record is not read again before nearly all others were,
so that neither a drifting disk nor a cache below it favours one of them.

Raw reads come in two kinds: `whole` (a record is one preadv) and `split` (a record is cut
evenly for all threads, as the engine does to keep the disk busy with a single record). The
bar holds against the faster one of each batch size.

The engine reads in two kinds as well: `engine`, records that it has read and checked before, and
`checked`, which compares them with their checksums, as a first read or any read with `verify` does.
What that costs a server is measured on servers: see check_cost.py.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts import check_cost  # noqa: E402
from scripts.harness.options import parser_of  # noqa: E402
from scripts.harness.report import Bar, report_of  # noqa: E402
from scripts.raw_reader import Part, RawReader, split_evenly  # noqa: E402
from vllm_moe_offload.cache.layout import ExpertLayout, TensorSpec  # noqa: E402
from vllm_moe_offload.cache.pool import SlotPool  # noqa: E402
from vllm_moe_offload.rank import Rank  # noqa: E402
from vllm_moe_offload.store import (  # noqa: E402
    ExpertStore,
    StoreBuilder,
    StoreError,
    StoreIdentity,
    open_store,
    store_lock,
)
from vllm_moe_offload.store.direct_io import aligned_buffer  # noqa: E402
from vllm_moe_offload.transfer import TransferEngine  # noqa: E402
from vllm_moe_offload.transfer.engine import DEFAULT_THREADS  # noqa: E402

Bytes = npt.NDArray[np.uint8]

BATCHES = (1, 2, 4, 8)
KINDS = ("engine", "checked", "whole", "split")
NUM_EXPERTS = 16


def _weights(hidden: int, intermediate: int) -> ExpertLayout:
    """Layout of a bf16 expert as the CPU kernel wants it."""
    return ExpertLayout(
        (
            TensorSpec(
                "w13_weight", (2 * intermediate, hidden), "bfloat16", 4 * intermediate * hidden
            ),
            TensorSpec(
                "w2_weight", (hidden, intermediate), "bfloat16", 2 * intermediate * hidden
            ),
        )
    )


LAYOUTS = {
    "12.6 MB": _weights(1024, 2048),
    "1.6 MB": _weights(512, 512),
}
"""Experts of the demo model that most benchmarks serve, and of `make demo`."""


# ---- the store ---------------------------------------------------------------------------


def make_store(store_dir: Path, layout: ExpertLayout, total_bytes: int) -> ExpertStore:
    """A store of about ``total_bytes`` random bytes; an old one of that shape is opened."""
    layers = max(1, round(total_bytes / (NUM_EXPERTS * layout.record_bytes)))
    identity = StoreIdentity(
        checkpoint="random bytes of bench_reads.py",
        load_format="auto",
        dtype="bfloat16",
        quantization="none",
        kernel="none",
        padded_shape=(layers, layout.record_bytes),
        rank=Rank(),
        stages=(0,),
        expert_placement="linear",
        vllm_version="none",
    )
    directory = identity.directory(store_dir, "random")
    with store_lock(directory):
        try:
            found = open_store(directory, identity, layout)
        except StoreError:
            shutil.rmtree(directory)
            found = None
        if found is not None:
            return found
        rng = np.random.default_rng(0)
        tensors = {
            spec.name: rng.integers(0, 256, (NUM_EXPERTS, spec.nbytes), np.uint8)
            for spec in layout.tensors
        }
        with StoreBuilder(directory, identity, layers, NUM_EXPERTS) as builder:
            for layer in track(range(layers), "Store of random bytes", transient=True):
                for rows in tensors.values():
                    rows[:] += np.uint8(1)  # no two layers alike
                builder.write_layer(layer, layout, tensors)
            return builder.commit()


class Picks:
    """Picks records at random, hardly ever one that was picked a short while ago."""

    def __init__(self, store: ExpertStore, rng: random.Random) -> None:
        self._all = list(product(range(store.num_layers), range(store.num_experts)))
        self._left: list[tuple[int, int]] = []
        self._rng = rng

    def take(self, count: int) -> list[tuple[int, int]]:
        """``count`` different (layer, expert), from those not taken since the last shuffle."""
        if len(self._left) < count:
            self._left = self._rng.sample(self._all, len(self._all))
        taken, self._left = self._left[:count], self._left[count:]
        return taken


# ---- measuring ---------------------------------------------------------------------------


def buffers_of(count: int, nbytes: int) -> Bytes:
    """Rows ``[count, nbytes]`` in memory like the pool's: one region, page-aligned, touched.

    One region, because that gets huge pages. Into separate buffers of 1.6 MB, too small for
    them, raw threads read at 1.1 GB/s while the engine read into its pool at 2.8.
    """
    rows = aligned_buffer(count * nbytes).reshape(count, nbytes)
    rows.fill(0)
    return rows


def measure(
    store: ExpertStore, threads: int, repeats: int, directory: Path, seed: int = 0
) -> dict[int, dict[str, list[float]]]:
    """Bytes per second: batch size -> kind of read -> one sample per repeat."""
    rng = random.Random(seed)
    picks = Picks(store, rng)
    record_bytes = store.layout.record_bytes
    pool = SlotPool(store.layout, max(BATCHES))
    buffers = buffers_of(max(BATCHES), record_bytes)
    speeds: dict[int, dict[str, list[float]]] = {
        batch: {kind: [] for kind in KINDS} for batch in BATCHES
    }
    turns = [(batch, kind) for batch in BATCHES for kind in KINDS]
    with contextlib.ExitStack() as stack:
        engines = {}
        for kind, verify in (("engine", False), ("checked", True)):
            engines[kind] = TransferEngine(
                store, pool.destinations(), num_threads=threads, verify=verify
            )
            stack.callback(engines[kind].close)
        if not engines["engine"].direct:
            raise RuntimeError(f"{store.path}: the file system refuses O_DIRECT")
        read_all_once(store, engines["engine"])
        with RawReader(store.path, threads, directory) as raw:
            for repeat in range(-2, repeats):  # the first two warm up
                rng.shuffle(turns)
                for batch, kind in turns:
                    seconds = _time(
                        kind,
                        picks.take(batch),
                        engines=engines,
                        raw=raw,
                        store=store,
                        buffers=buffers,
                        threads=threads,
                    )
                    if repeat >= 0:
                        speeds[batch][kind].append(batch * record_bytes / seconds)
    return speeds


def read_all_once(store: ExpertStore, engine: TransferEngine) -> None:
    """Has every record checked, so that later reads are not."""
    for layer, expert in product(range(store.num_layers), range(store.num_experts)):
        engine.read([(layer, expert, 0)])


def _time(
    kind: str,
    chosen: Sequence[tuple[int, int]],
    *,
    engines: Mapping[str, TransferEngine],
    raw: RawReader,
    store: ExpertStore,
    buffers: Bytes,
    threads: int,
) -> float:
    """Seconds to read the records in one of the :data:`KINDS` of ways."""
    if kind in engines:
        requests = [(layer, expert, row) for row, (layer, expert) in enumerate(chosen)]
        began = time.perf_counter()
        engines[kind].read(requests)
        return time.perf_counter() - began
    parts = [
        Part(store.record_offset(layer, expert), buffer.ctypes.data, buffer.nbytes)
        for (layer, expert), buffer in zip(chosen, buffers, strict=False)
    ]
    if kind == "split":
        parts = [piece for part in parts for piece in split_evenly(part, threads)]
    array = (Part * len(parts))(*parts)
    began = time.perf_counter()
    raw.read(array)
    return time.perf_counter() - began


def measure_cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every size of records in every size of batches."""
    cases: list[dict[str, Any]] = []
    for name, layout in LAYOUTS.items():
        store = make_store(args.work_dir / "reads", layout, int(args.store_gb * 1e9))
        speeds_of = measure(store, args.threads, args.repeats, args.work_dir)
        for batch, kinds in speeds_of.items():
            medians = {kind: statistics.median(values) for kind, values in kinds.items()}
            cases.append(
                {
                    "record_bytes": layout.record_bytes,
                    "record": name,
                    "batch": batch,
                    "ratio": medians["engine"] / max(medians["whole"], medians["split"]),
                    "checked_ratio": medians["checked"] / medians["engine"],
                    "median_bytes_per_s": medians,
                    "samples_bytes_per_s": kinds,
                }
            )
    return cases


def table_of(cases: Sequence[dict[str, Any]]) -> Table:
    """A row per case."""
    table = Table(title="Demand reads against raw O_DIRECT: GB/s (median)")
    for column in ("record", "batch", *KINDS, "engine / best raw", "checked / engine"):
        table.add_column(column, justify="right")
    for case in cases:
        speeds = [f"{case['median_bytes_per_s'][kind] / 1e9:.2f}" for kind in KINDS]
        ratios = [f"{case[ratio]:.2f}" for ratio in ("ratio", "checked_ratio")]
        table.add_row(case["record"], str(case["batch"]), *speeds, *ratios)
    return table


def main() -> int:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument(
        "--threads",
        type=int,
        default=DEFAULT_THREADS,
        help="reads in flight, of engine and raw alike (default: the engine's own %(default)s)",
    )
    parser.add_argument("--store-gb", type=float, default=2.4, help="size of each store (1e9)")
    check_cost.add_options(parser)
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.store_gb = 5, 0.2
        args.serving_repeats, args.rounds, args.tokens = 1, 2, 2
    cases = measure_cases(args)
    Console().print(table_of(cases))
    serving = check_cost.measure(args)
    Console().print(check_cost.table_of(serving))
    bars = [
        Bar(
            f"{case['record']} records, batch of {case['batch']}: bytes / stall time, engine to "
            "raw",
            case["ratio"],
            0.8,
        )
        for case in cases
    ]
    data = {"parameters": vars(args), "cases": cases, "serving": serving}
    report_of(args, "reads", data, bars)
    return 0


if __name__ == "__main__":
    sys.exit(main())
