"""A checkpoint's tensors in the order that offloading needs: dense first, then experts by layer.

vLLM's own stream follows the files. Sorting it lets each layer's experts be complete, put
in the store and freed before the next layer's are read, so that the model is never in
memory as a whole; and later starts skip experts altogether.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from vllm_moe_offload.config import OptionError
from vllm_moe_offload.integration.affinity import io_cpus
from vllm_moe_offload.integration.model_files import check_dtype, no_safetensors
from vllm_moe_offload.store.checkpoint_header import TensorRange, tensor_ranges
from vllm_moe_offload.store.checkpoint_reader import (
    DRAFTERS,
    TensorStream,
    expert_layer,
    expert_number,
)


class SortedCheckpoint:
    """Where every tensor of a checkpoint lies; tensors are read when asked for."""

    def __init__(
        self,
        loader: DefaultModelLoader,
        model_config: Any,
        model: torch.nn.Module,
        *,
        names_drafters: bool = False,
    ) -> None:
        """Reads the headers of the safetensors files, no weights.

        Args:
            loader: vLLM's; knows where the files are.
            model_config: of the model to load.
            model: that model, without weights.
            names_drafters: whether its experts are those that the checkpoint keeps apart for a
                drafter, by their names, and not the others.

        Raises:
            OptionError: the checkpoint is not in safetensors files, or one is damaged.
        """
        self.directory: Path | None = None
        """Of the model's own weights."""
        self.left_out: set[str] = set()
        """Whose experts are in the checkpoint and not in the model: drafters, as people call them."""
        self._dense: list[tuple[str, str, str]] = []  # name for the model, file, name in file
        self._experts: dict[int, list[tuple[str, TensorRange]]] = {}
        self._names_drafters = names_drafters
        sources = [
            DefaultModelLoader.Source(
                model_config.model,
                model_config.revision,
                fall_back_to_pt=getattr(model, "fall_back_to_pt_during_load", True),
                allow_patterns_overrides=getattr(model, "allow_patterns_overrides", None),
            ),
            *getattr(model, "secondary_weights", ()),
        ]
        for source in sources:
            self._index(loader, source)
        if loader.counter_before_loading_weights == 0.0:
            loader.counter_before_loading_weights = time.perf_counter()

    def _index(self, loader: DefaultModelLoader, source: Any) -> None:
        folder, files, is_safetensors, _ = loader._prepare_weights(
            source.model_or_path,
            source.subfolder,
            source.revision,
            source.fall_back_to_pt,
            source.allow_patterns_overrides,
        )
        if not is_safetensors:
            raise no_safetensors(folder)
        if self.directory is None:
            self.directory = Path(folder)
        for file in sorted(files):
            try:
                ranges = tensor_ranges(Path(file))
            except ValueError as error:
                raise OptionError(str(error)) from None
            for name, where in ranges.items():
                number = expert_layer(name)
                if number is not None and name.startswith(DRAFTERS) != self._names_drafters:
                    self.left_out.add("mtp")
                elif number is not None:
                    check_dtype(name, where)
                    entry = (source.prefix + name, where)
                    self._experts.setdefault(number, []).append(entry)
                else:
                    self._dense.append((source.prefix + name, file, name))

    @property
    def expert_layers(self) -> list[int]:
        """Decoder layers that have routed experts, ascending."""
        return sorted(self._experts)

    def leave_out(self, numbers: Collection[int], elsewhere: Collection[int]) -> None:
        """Forgets the experts of decoder layers ``numbers``, which the model does not have here;
        those in ``elsewhere`` it has in other workers."""
        for number in numbers:
            del self._experts[number]
            if number not in elsewhere:
                self.left_out.add(f"layer {number}")

    def dense(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors that are not routed experts'."""
        by_file: dict[str, list[tuple[str, str]]] = {}
        for name, file, name_in_file in self._dense:
            by_file.setdefault(file, []).append((name, name_in_file))
        for file, names in by_file.items():
            with safe_open(file, framework="pt") as tensors:
                for name, name_in_file in names:
                    yield name, tensors.get_tensor(name_in_file)

    def experts(
        self, numbers: Sequence[int], own: Collection[int] | None = None
    ) -> TensorStream:
        """The routed experts' tensors of decoder layers, a group per layer.

        ``own``: the experts that are wanted, None for all; tensors of several come whole.
        """
        wanted = None if own is None else frozenset(own)
        groups = [
            [
                entry
                for entry in self._experts[number]
                if wanted is None or expert_number(entry[0]) in (None, *wanted)
            ]
            for number in numbers
        ]
        return TensorStream(groups, io_cpus())
