"""From a checkpoint to a store and a slot pool, without ever holding the model.

First start: dense weights load as always; then, layer by layer, a layer's experts load into
its full parameters, are put into kernel form, written to the store and freed. Later starts
leave experts out of the stream and open the store.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tqdm import tqdm
from vllm.config import get_current_vllm_config
from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight
from vllm.platforms import current_platform

from vllm_moe_offload.cache.layout import ALIGNMENT, ExpertLayout
from vllm_moe_offload.cache.sizing import OVERLAPPED_LAYER_BYTES
from vllm_moe_offload.config import GIB, OffloadConfig, OptionError
from vllm_moe_offload.integration import lora_adapters, patching, speculation
from vllm_moe_offload.integration.affinity import io_cpus
from vllm_moe_offload.integration.arguments import options_of
from vllm_moe_offload.integration.checkpoint import SortedCheckpoint
from vllm_moe_offload.integration.expert_tensors import (
    as_bytes,
    check_on_host,
    expert_tensors,
    free,
    layout_of,
)
from vllm_moe_offload.integration.experts import offloaded_layers
from vllm_moe_offload.integration.formats import format_of, pack, take_stored_form
from vllm_moe_offload.integration.model_files import model_name, with_config
from vllm_moe_offload.integration.placement import (
    decoder_layers,
    drafter_stages_of,
    rank_of,
    stages_of,
)
from vllm_moe_offload.integration.routers import routers_of
from vllm_moe_offload.integration.worker_load import (
    LoadedExperts,
    drafter_is_loaded,
    model_is_loaded,
)
from vllm_moe_offload.store import (
    BackgroundWriter,
    DamagedStore,
    ExpertStore,
    StoreBuilder,
    StoreIdentity,
    checkpoint_fingerprint,
    delete,
    open_store,
    store_lock,
)
from vllm_moe_offload.store.checkpoint_reader import DRAFTERS
from vllm_moe_offload.store.direct_io import aligned_buffer
from vllm_moe_offload.store.shelf import log_others

logger = logging.getLogger("vllm.moe_offload")


def stream_weights(
    original: Any, loader: Any, model_config: Any, model: torch.nn.Module
) -> Iterator[tuple[str, torch.Tensor]]:
    """DefaultModelLoader.get_all_weights for a model with offloaded experts."""
    vllm_config = get_current_vllm_config()
    load = _begin(vllm_config, model_config, model)
    if load is None:
        yield from original(loader, model_config, model)
        _end_without_experts(vllm_config, model_config)
        return
    checkpoint = SortedCheckpoint(
        loader, model_config, model, names_drafters=load.names_drafters
    )
    load.identify(checkpoint.directory)
    numbers = load.check_layers(checkpoint)
    with store_lock(load.directory):
        store = load.open_store()
        yield from checkpoint.dense()
        if store is None:
            with (
                load.builder() as builder,
                BackgroundWriter(builder) as writer,
                checkpoint.experts(numbers, load.own_experts) as stream,
            ):
                for index in load.progress():
                    load.prepare_layer(index, stream.next_elements)
                    yield from stream.next_group()
                    load.store_layer(writer, index)
                writer.wait()
                load.commit(builder)
    load.finish()


def load_dummy_weights(
    original: Any, loader: Any, model: torch.nn.Module, model_config: Any
) -> None:
    """DummyModelLoader.load_weights: random experts too, one layer in memory at a time."""
    vllm_config = get_current_vllm_config()
    load = _begin(vllm_config, model_config, model)
    if load is None:
        original(loader, model, model_config)
        _end_without_experts(vllm_config, model_config)
        return
    offloaded = set(map(id, load.layers))
    dense = [module for module in model.modules() if id(module) not in offloaded]
    original(loader, SimpleNamespace(modules=lambda: dense), model_config)
    load.identify(None)
    with store_lock(load.directory):
        if load.open_store() is None:
            with load.builder() as builder, BackgroundWriter(builder) as writer:
                for index in load.progress():
                    for tensor in expert_tensors(load.layers[index]).values():
                        _initialize_dummy(tensor)
                    load.store_layer(writer, index)
                writer.wait()
                load.commit(builder)
    load.finish()


def _initialize_dummy(tensor: torch.Tensor) -> None:
    """vLLM's random values, drawn on the device where plain vLLM draws them: they differ."""
    device = current_platform.device_type
    drawn = torch.empty_like(tensor, device=device) if device != "cpu" else tensor
    initialize_single_dummy_weight(drawn)
    if drawn is not tensor:
        tensor.copy_(drawn)


def _begin(vllm_config: Any, model_config: Any, model: torch.nn.Module) -> ExpertLoad | None:
    options = options_of(vllm_config)
    if not options.enabled:
        return None
    if speculation.drafts(vllm_config, model_config):
        layers = _drafter_layers(vllm_config, model)
    else:
        layers = _model_layers(vllm_config, options, model)
    return ExpertLoad(vllm_config, options, model_config, model, layers) if layers else None


def _drafter_layers(vllm_config: Any, model: torch.nn.Module) -> list[Any]:
    if vllm_config.speculative_config.uses_draft_model():
        return []  # what experts it has are its own affair
    layers = offloaded_layers(model)
    if layers:
        speculation.check_own_experts(vllm_config)
    return layers


def _model_layers(
    vllm_config: Any, options: OffloadConfig, model: torch.nn.Module
) -> list[Any]:
    layers = offloaded_layers(model)
    if not layers and vllm_config.parallel_config.pipeline_parallel_size > 1:
        logger.warning(
            "MoE offload: this pipeline stage has no routed experts; it runs as in plain vLLM and "
            "has no counters of its own"
        )
    elif not layers:
        raise OptionError(
            f"--moe-offload={options.mode}: {type(model).__name__} was built without a single "
            "routed expert layer; use --moe-offload=off"
        )
    lora_adapters.check(model, vllm_config.lora_config)
    return layers


def _end_without_experts(vllm_config: Any, model_config: Any) -> None:
    """A model was loaded that has nothing in a store; others may have waited for it."""
    options = options_of(vllm_config)
    if options.enabled and speculation.drafts(vllm_config, model_config):
        drafter_is_loaded(vllm_config, options, None)


class ExpertLoad:
    """One model's way from its checkpoint into store and pool."""

    def __init__(
        self,
        vllm_config: Any,
        options: OffloadConfig,
        model_config: Any,
        model: torch.nn.Module,
        layers: list[Any],
    ) -> None:
        self._model = model
        self._model_config = model_config
        self._is_drafter = speculation.drafts(vllm_config, model_config)
        self.options = options
        self.layers = layers
        self._vllm_config = vllm_config
        self._formats = [format_of(layer) for layer in layers]
        experts = {layer.local_num_experts for layer in layers}
        if len(experts) != 1:
            raise OptionError(
                f"--moe-offload: layers with different numbers of experts {sorted(experts)} are "
                "not supported; use --moe-offload=off"
            )
        self.num_experts = experts.pop()
        share = layers[0].share
        self.own_experts: Collection[int] | None = None if share is None else share.experts
        self._store: ExpertStore | None = None
        self._layout: ExpertLayout | None = None
        self._landing: torch.Tensor | None = None
        self._build_began = 0.0

    def identify(self, weights: Path | None) -> None:
        """Which store is the model's; ``weights``: where they are, None if they are not read."""
        model_dir = with_config(self._vllm_config, self._model_config, weights)
        self._identity = self._identify(model_dir)
        self.directory: Path = self._identity.directory(
            Path(self.options.store_dir), model_name(str(self._model_config.model))
        )

    @property
    def names_drafters(self) -> bool:
        """Whether the layers are named as those that a checkpoint keeps apart for a drafter."""
        return str(self.layers[0].layer_name).startswith(DRAFTERS)

    def check_layers(self, checkpoint: SortedCheckpoint) -> list[int]:
        """Decoder layer of every MoE layer; what other layers' experts there are is left out.

        Raises:
            OptionError: the checkpoint lacks the experts of a layer.
        """
        expected = decoder_layers(self.layers)
        in_checkpoint = checkpoint.expert_layers
        if len(set(expected)) != len(self.layers) or not set(expected) <= set(in_checkpoint):
            names = [layer.layer_name for layer in self.layers]
            raise OptionError(
                f"--moe-offload: the model has experts in {names}, but the checkpoint names "
                f"experts in layers {in_checkpoint}; this checkpoint is not supported, use "
                "--moe-offload=off"
            )
        checkpoint.leave_out(set(in_checkpoint) - set(expected), self._other_stages())
        speculative = self._vllm_config.speculative_config
        if checkpoint.left_out and (speculative is None or speculative.method != "mtp"):
            logger.info(
                "MoE offload: experts of %s are in the checkpoint and not in the model (multi-token "
                "prediction); they are left out",
                ", ".join(sorted(checkpoint.left_out)),
            )
        return expected

    def _other_stages(self) -> Collection[int]:
        """Decoder layers that other workers have."""
        model = self._vllm_config.model_config
        if self._vllm_config.parallel_config.pipeline_parallel_size == 1:
            return ()
        return range(model.get_total_num_hidden_layers())

    def open_store(self) -> ExpertStore | None:
        """The store if it was built before; what is damaged goes, to be built again."""
        try:
            self._store = open_store(
                self.directory,
                self._identity,
                num_layers=len(self.layers),
                num_experts=self.num_experts,
            )
        except DamagedStore as damage:
            logger.warning("MoE offload: %s; the store is built again", damage)
            delete(self.directory)
        if self._store is not None:
            logger.info("MoE offload: store %s opened, experts are not loaded", self.directory)
        if self._identity.rank.is_first and not self._is_drafter:
            log_others(self.directory.parent)
        return self._store

    def builder(self) -> StoreBuilder:
        """A builder for the missing store; its layout is known after the first layer."""
        logger.info("MoE offload: building the expert store in %s", self.directory)
        self._build_began = time.perf_counter()
        return StoreBuilder(
            self.directory,
            self._identity,
            len(self.layers),
            self.num_experts,
            cpus=io_cpus(),
        )

    def progress(self) -> Iterator[int]:
        """Index of every MoE layer, behind a progress bar."""
        bar = tqdm(
            range(len(self.layers)),
            desc="Building expert store",
            unit="layer",
            disable=not self._vllm_config.load_config.use_tqdm_on_load,
        )
        return iter(bar)

    def prepare_layer(self, index: int, num_elements: int) -> None:
        """Gives the layer's parameters memory to be loaded into: the same for all layers.

        vLLM allocated memory for every layer, but nothing touched it yet. Page faults of
        fresh memory take longer than copying the weights. ``num_elements``: in the checkpoint.
        """
        tensors = expert_tensors(self.layers[index])
        if any(tensor.device.type != "cpu" for tensor in tensors.values()):
            return
        sizes = [tensor.nbytes + -tensor.nbytes % ALIGNMENT for tensor in tensors.values()]
        if self._landing is None or self._landing.nbytes < sum(sizes):
            self._landing = torch.from_numpy(aligned_buffer(sum(sizes)))
        if num_elements != sum(tensor.numel() for tensor in tensors.values()):
            self._landing.zero_()  # padded parameters, or a rank's share of them
        offset = 0
        for (name, tensor), size in zip(tensors.items(), sizes, strict=True):
            flat = self._landing[offset : offset + tensor.nbytes].view(tensor.dtype)
            getattr(self.layers[index], name).data = flat.view(tensor.shape)
            offset += size

    def _leave_landing(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor where the next layer will not overwrite it."""
        landing = self._landing
        if landing is None or tensor.device.type != "cpu":
            return tensor
        begin = tensor.data_ptr() - landing.data_ptr()
        return tensor.clone() if 0 <= begin < landing.nbytes else tensor

    def store_layer(self, writer: BackgroundWriter, index: int) -> None:
        """Puts a loaded layer into kernel form, has its records written, frees its memory.

        The layer before was written meanwhile; small ones while this one is packed, too.
        """
        layer = self.layers[index]
        if self._landing is None or self._landing.nbytes > OVERLAPPED_LAYER_BYTES:
            writer.wait()
        pack(layer, self._formats[index])
        tensors = expert_tensors(layer)
        check_on_host(layer, tensors)
        layout = layout_of(tensors)
        if self._layout is None:
            self._layout = layout
        elif layout != self._layout:
            raise OptionError(
                f"--moe-offload: the experts of {layer.layer_name} differ in shape from those of "
                f"{self.layers[0].layer_name}; use --moe-offload=off"
            )
        writer.write_layer(
            index,
            layout,
            {name: as_bytes(self._leave_landing(tensor)) for name, tensor in tensors.items()},
        )
        free(layer)

    def commit(self, builder: StoreBuilder) -> None:
        """Makes the store the one that later starts open."""
        self._landing = None
        if any(known.packs_on_device for known in self._formats):
            torch.cuda.empty_cache()  # what is left of packing is no model's memory
        self._store = builder.commit()
        gib = self._store.path.stat().st_size / GIB
        seconds = time.perf_counter() - self._build_began
        logger.info("MoE offload: store built: %.2f GiB in %.1f s", gib, seconds)

    def finish(self) -> None:
        """The experts are in their store; once no other model is to be loaded, they are served."""
        store = self._store
        if store is None:
            raise RuntimeError("the expert store was neither opened nor built")
        for layer, known in zip(self.layers, self._formats, strict=True):
            take_stored_form(layer, store.layout, known)
            # FusedMoEMethodBase.process_weights_after_loading
            # (model_executor/layers/fused_moe/fused_moe_method_base.py)
            #   why: the loader's own pass over all modules would process the pool's slots again;
            #     only on the objects of offloaded layers.
            #   upstream: model_loader/utils.py (process_weights_after_loading asks no layer).
            #   remove when: a layer can say that its weights are in kernel form.
            layer.quant_method.process_weights_after_loading = _already_processed
        routers = None
        if not self._is_drafter:
            with torch.device("cpu"):
                routers = routers_of(self._model, self.layers)
        experts = LoadedExperts(self.layers, self._formats, store, routers)
        is_loaded = drafter_is_loaded if self._is_drafter else model_is_loaded
        is_loaded(self._vllm_config, self.options, experts)

    def _identify(self, model_dir: Path) -> StoreIdentity:
        config, layer = self._vllm_config, self.layers[0]
        method = layer.quant_method
        load_format = config.load_config.load_format
        return StoreIdentity(
            checkpoint=checkpoint_fingerprint(model_dir),
            load_format=str(getattr(load_format, "value", load_format)),
            dtype=str(layer.params_dtype).removeprefix("torch."),
            quantization=self._model_config.quantization or "none",
            kernel=f"{method.experts_cls.__name__}:{getattr(method.experts_cls, 'isa', '')}",
            padded_shape=(layer.hidden_size, layer.intermediate_size_per_partition),
            rank=rank_of(layer),
            stages=drafter_stages_of(config) if self._is_drafter else stages_of(config),
            expert_placement=layer.expert_placement_strategy,
            vllm_version=patching.vllm_version(),
        )


def _already_processed(layer: torch.nn.Module) -> None:
    del layer
