"""The slot pool: for every parameter of an expert one dense tensor ``[rows, ...]``."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_moe_offload.cache.host_memory import anonymous_region, populate
from vllm_moe_offload.cache.layout import ExpertLayout, TensorSpec


class SlotPool:
    """Fast memory for experts, in RAM or on a device.

    In RAM it is page aligned, so that O_DIRECT reads land in the rows.

    Attributes:
        layout: what one row of each tensor holds.
        num_rows: rows of every tensor; a row index names the same expert in all of them,
            so that weights and biases can never disagree.
        device: where the rows are.
        tensors: parameter name to tensor ``[num_rows, *shape]``, zero at first.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        num_rows: int,
        *,
        populate: bool = True,
        device: torch.device | None = None,
    ) -> None:
        """Allocates the pool.

        Args:
            layout: what one row of each tensor holds.
            num_rows: rows of every tensor.
            populate: bring all pages in. vLLM's CPU worker sizes the KV cache from its resident
                set, so they must be there before it looks; who fills all rows at once can save
                the time. For RAM only.
            device: where; None: in RAM.

        Raises:
            MemoryError: the system refuses the memory.
            torch.OutOfMemoryError: the device does.
        """
        self.layout = layout
        self.num_rows = num_rows
        self.device = torch.device("cpu") if device is None else device
        self.tensors: dict[str, torch.Tensor] = {}
        self._bytes: dict[str, npt.NDArray[np.uint8]] = {}
        for spec in layout.tensors:
            if device is None:
                rows = _rows_in_ram(spec, num_rows, populate)
                self._bytes[spec.name] = rows
                flat = torch.from_numpy(rows.reshape(-1))
            else:
                flat = torch.zeros(num_rows * spec.nbytes, dtype=torch.uint8, device=device)
            flat = flat.view(getattr(torch, spec.dtype))
            self.tensors[spec.name] = flat.view(num_rows, *spec.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.num_rows * self.layout.expert_bytes

    def bytes_of(self, name: str) -> npt.NDArray[np.uint8]:
        """The rows of one parameter as uint8 ``[num_rows, nbytes]``, sharing memory.

        Raises:
            ValueError: they are on a device.
        """
        return self.destinations()[name]

    def destinations(self) -> dict[str, npt.NDArray[Any]]:
        """All parameters' rows as bytes, the targets of a TransferEngine.

        Raises:
            ValueError: they are on a device.
        """
        if not self._bytes:
            raise ValueError(f"the rows are on {self.device}: only a copier can write to them")
        return dict(self._bytes)

    def addresses(self) -> dict[str, int]:
        """Where each parameter's rows begin, on the pool's device: the targets of a copier."""
        return {name: tensor.data_ptr() for name, tensor in self.tensors.items()}


def _rows_in_ram(spec: TensorSpec, num_rows: int, touch: bool) -> npt.NDArray[np.uint8]:
    nbytes = num_rows * spec.nbytes
    try:
        region = anonymous_region(nbytes)
    except OSError as error:
        raise MemoryError(
            f"cannot allocate {nbytes} bytes for {num_rows} rows of {spec.name}: {error}; "
            "lower cache_gb"
        ) from error
    if touch:
        populate(region)
    return np.frombuffer(region, np.uint8).reshape(num_rows, spec.nbytes)
