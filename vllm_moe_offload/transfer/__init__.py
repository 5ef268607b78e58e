"""Moves experts from the store into slots of the slot pool: demands and prefetches."""

from vllm_moe_offload.transfer.base import Transfer
from vllm_moe_offload.transfer.copier import Copier
from vllm_moe_offload.transfer.device import DeviceTransfer
from vllm_moe_offload.transfer.engine import TransferEngine
from vllm_moe_offload.transfer.flights import Flight, State, TransferError
from vllm_moe_offload.transfer.host_tier import HostTier

__all__ = [
    "Copier",
    "DeviceTransfer",
    "Flight",
    "HostTier",
    "State",
    "Transfer",
    "TransferEngine",
    "TransferError",
]
