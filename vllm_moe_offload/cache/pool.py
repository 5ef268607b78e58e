"""The slot pool: for every parameter of an expert one dense tensor ``[slots, ...]``."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_moe_offload.cache.host_memory import anonymous_region, populate
from vllm_moe_offload.cache.layout import ExpertLayout, TensorSpec


class SlotPool:
    """Fast memory for experts, in RAM or on a device.

    In RAM it is page aligned, so that O_DIRECT reads land in the slots.

    Attributes:
        layout: what one slot of each tensor holds.
        num_slots: slots of every tensor; a slot index names the same expert in all of them,
            so that weights and biases can never disagree.
        device: where the slots are.
        tensors: parameter name to tensor ``[num_slots, *shape]``, zero at first.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        num_slots: int,
        *,
        populate: bool = True,
        device: torch.device | None = None,
    ) -> None:
        """Allocates the pool.

        Args:
            layout: what one slot of each tensor holds.
            num_slots: slots of every tensor.
            populate: bring all pages in. vLLM's CPU worker sizes the KV cache from its resident
                set, so they must be there before it looks; who fills all slots at once can save
                the time. For RAM only.
            device: where; None: in RAM.

        Raises:
            MemoryError: the system refuses the memory.
            torch.OutOfMemoryError: the device does.
        """
        self.layout = layout
        self.num_slots = num_slots
        self.device = torch.device("cpu") if device is None else device
        self.tensors: dict[str, torch.Tensor] = {}
        self._bytes: dict[str, npt.NDArray[np.uint8]] = {}
        for spec in layout.tensors:
            if device is None:
                slots = _slots_in_ram(spec, num_slots, populate)
                self._bytes[spec.name] = slots
                flat = torch.from_numpy(slots.reshape(-1))
            else:
                flat = torch.zeros(num_slots * spec.nbytes, dtype=torch.uint8, device=device)
            flat = flat.view(getattr(torch, spec.dtype))
            self.tensors[spec.name] = flat.view(num_slots, *spec.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.num_slots * self.layout.expert_bytes

    def destinations(self) -> dict[str, npt.NDArray[Any]]:
        """All parameters' slots as bytes, the targets of a TransferEngine.

        Raises:
            ValueError: they are on a device.
        """
        if not self._bytes:
            raise ValueError(f"the slots are on {self.device}: only a copier can write to them")
        return dict(self._bytes)


def _slots_in_ram(spec: TensorSpec, num_slots: int, touch: bool) -> npt.NDArray[np.uint8]:
    nbytes = num_slots * spec.nbytes
    try:
        region = anonymous_region(nbytes)
    except OSError as error:
        raise MemoryError(
            f"cannot allocate {nbytes} bytes for {num_slots} slots of {spec.name}: {error}; "
            "lower cache_gb"
        ) from error
    if touch:
        populate(region)
    return np.frombuffer(region, np.uint8).reshape(num_slots, spec.nbytes)
