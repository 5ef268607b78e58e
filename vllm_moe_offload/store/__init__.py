"""The expert store: all experts of a model in one file, in the form that the kernel reads.

A store is a directory with ``experts.bin`` (records, layer by layer, 4 KiB aligned; see
:mod:`vllm_moe_offload.cache.layout`) and ``manifest.json`` (what it was built from, checksums).
It comes into being by one rename: what opens is complete.
"""

from vllm_moe_offload.store.builder import BackgroundWriter, StoreBuilder
from vllm_moe_offload.store.directory import delete, store_lock
from vllm_moe_offload.store.errors import DamagedStore, StoreError
from vllm_moe_offload.store.expert_store import ExpertStore, joined, open_store
from vllm_moe_offload.store.identity import StoreIdentity, checkpoint_fingerprint

__all__ = [
    "BackgroundWriter",
    "DamagedStore",
    "ExpertStore",
    "StoreBuilder",
    "StoreError",
    "StoreIdentity",
    "checkpoint_fingerprint",
    "delete",
    "joined",
    "open_store",
    "store_lock",
]
