"""``vllm-moe-offload store``: which expert stores there are, and are they whole? Deletes them."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from vllm_moe_offload.cli.command import Command, UsageError
from vllm_moe_offload.config import GIB, default_store_dir
from vllm_moe_offload.store import ExpertStore
from vllm_moe_offload.store.shelf import ShelvedModel, remove, shelved_models
from vllm_moe_offload.transfer.flights import TransferError
from vllm_moe_offload.transfer.host_tier import HostTier

_BATCH = 8
"""Records that are read at a time."""


def _add_store_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store-dir",
        type=Path,
        default=Path(default_store_dir()),
        help="as the server's option store_dir (default: %(default)s)",
    )


def _add_names(parser: argparse.ArgumentParser, which: str) -> None:
    _add_store_dir(parser)
    parser.add_argument("names", nargs="+", metavar="STORE", help=which)


def _chosen(arguments: argparse.Namespace) -> list[ShelvedModel]:
    """The stores that are named: by directory, or by model, which may be several.

    Raises:
        UsageError: there is none of that name.
    """
    shelved = shelved_models(arguments.store_dir)
    chosen: dict[Path, ShelvedModel] = {}
    for name in arguments.names:
        found = [one for one in shelved if name in (one.directory.name, one.model)]
        if not found:
            known = ", ".join(one.directory.name for one in shelved) or "none"
            raise UsageError(
                f"there is no store {name!r} in {arguments.store_dir}; there are: {known}"
            )
        chosen |= {one.directory: one for one in found}
    return list(chosen.values())


def _run_list(arguments: argparse.Namespace) -> int:
    shelved = shelved_models(arguments.store_dir)
    if not shelved:
        print(f"There are no stores in {arguments.store_dir}")
        return 0
    table = Table()
    for heading in ("store", "vLLM", "built", "GiB", "state"):
        table.add_column(heading, justify="right" if heading == "GiB" else "left")
    for one in shelved:
        version = one.parts[0].identity.vllm_version if one.parts else ""
        size = f"{one.nbytes / GIB:.2f}"
        built = time.strftime("%Y-%m-%d", time.localtime(one.built)) if one.built else ""
        cells = (one.directory.name, version, built, size, one.state)
        table.add_row(*map(Text, cells))  # brackets in them are no markup
    Console().print(table)
    print(f"{sum(one.nbytes for one in shelved) / GIB:.2f} GiB in {arguments.store_dir}")
    return 0


def _run_verify(arguments: argparse.Namespace) -> int:
    damaged = 0
    for one in _chosen(arguments):
        lines = [*one.faults, *(line for part in one.parts for line in _faults_of(part))]
        if not one.parts and not lines:
            lines = [one.state]
        damaged += bool(lines)
        print(f"{one.directory.name}: {'damaged' if lines else 'every record is intact'}")
        if one.parts and one.num_missing:
            print(
                f"  {one.state}: workers on other machines have theirs there; a start builds what "
                "its machine lacks"
            )
        for line in lines:
            print(f"  {line}")
        if lines:
            print("  the next start of a server builds what is damaged or missing again")
    return int(damaged > 0)


def _faults_of(store: ExpertStore) -> Iterator[str]:
    """Every record that cannot be read, or is not what was written."""
    records = [
        (layer, expert)
        for layer in range(store.num_layers)
        for expert in range(store.num_experts)
    ]
    tier = HostTier(store, _BATCH, verify=True)
    with (
        contextlib.closing(tier),
        tqdm(
            total=len(records), unit="expert", file=sys.stderr, leave=False, disable=None
        ) as bar,
    ):
        for begin in range(0, len(records), _BATCH):
            batch = [
                (layer, expert, slot)
                for slot, (layer, expert) in enumerate(records[begin : begin + _BATCH])
            ]
            try:
                tier.files.read(batch)
            except TransferError:
                for request in batch:  # which of them
                    try:
                        tier.files.read([request])
                    except TransferError as error:
                        yield str(error)
            bar.update(len(batch))


def _run_remove(arguments: argparse.Namespace) -> int:
    for one in _chosen(arguments):
        remove(one)
        print(f"removed {one.directory} ({one.nbytes / GIB:.2f} GiB)")
    return 0


COMMANDS = [
    Command(("store", "list"), "expert stores, and what they take", _add_store_dir, _run_list),
    Command(
        ("store", "verify"),
        "reads every record of stores and compares its checksum",
        lambda parser: _add_names(parser, "directory of a store, or name of a model"),
        _run_verify,
    ),
    Command(
        ("store", "remove"),
        "deletes stores, and the activation matrices beside them; the next start builds them again",
        lambda parser: _add_names(
            parser, "directory of a store, or name of a model: all of it"
        ),
        _run_remove,
    ),
]
