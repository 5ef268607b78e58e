"""Which ranks of a CPU server really share memory."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch.distributed

from vllm_moe_offload.integration.patching import wrap

logger = logging.getLogger("vllm.moe_offload")

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
SHARED = Path("/dev/shm")


# CpuCommunicator._all_group_ranks_share_shm_group_name
# (distributed/device_communicators/cpu_communicator.py)
#   why: it compares names made of the port and the ranks alone, which are equal on every host;
#     ranks on two hosts then wait for each other in memory that each has for itself.
#   upstream: v1/worker/cpu_worker.py (VLLM_DIST_IDENT).
#   remove when: the name says which host it is of.
def install() -> None:
    """Lets ranks of different machines, or with different /dev/shm, talk over the network."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    wrap(CpuCommunicator, "_all_group_ranks_share_shm_group_name", _share_memory)


def memory_of_this_process() -> tuple[str, int]:
    """Equal in two processes exactly if they can share memory by name.

    Returns:
        The machine, and which file system /dev/shm is: containers of one machine may each have
        their own, and different machines may number theirs alike.

    Raises:
        OSError: one of them cannot be asked.
    """
    return boot_id(), os.stat(SHARED).st_dev


def boot_id() -> str:
    """Which start of which machine this is; empty where the system does not tell."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""


def _share_memory(original: Any, self: Any) -> bool:
    """Asks all ranks of the group, in the same order: both questions are collective."""
    if not original(self):
        return False
    found: list[Any] = [None] * self.world_size
    torch.distributed.all_gather_object(
        found, memory_of_this_process(), group=self.device_group
    )
    if len(set(found)) == 1:
        return True
    logger.info(
        "MoE offload: ranks %s of group %s do not share memory and talk over the network",
        self.ranks,
        self.unique_name,
    )
    return False
