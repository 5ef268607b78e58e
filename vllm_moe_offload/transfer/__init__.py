"""Moves experts from the store into rows of the slot pool: demands and prefetches."""

from vllm_moe_offload.transfer.engine import TransferEngine
from vllm_moe_offload.transfer.outcome import FinishedPrefetch, TransferError

__all__ = ["FinishedPrefetch", "TransferEngine", "TransferError"]
