"""RoutedExperts whose weights are slots of the slot pool.

One mixin for every RoutedExperts class, and one opaque operator around
``quant_method.apply``: Dynamo sees ``forward(x, topk_weights, topk_ids, layer_name)`` and
nothing of the planning and reading inside. (An operator around planning alone was seen to
change logprobs under Inductor now and then; this boundary never was.)
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.library import Library
from vllm.config import get_current_vllm_config_or_none
from vllm.forward_context import get_forward_context
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.utils.torch_utils import (
    LayerNameType,
    _encode_layer_name,
    _resolve_layer_name,
    direct_register_custom_op,
)

from vllm_moe_offload.config import OptionError
from vllm_moe_offload.device.runtime import DeviceRuntime
from vllm_moe_offload.integration.arguments import options_of
from vllm_moe_offload.integration.block_slots import apply
from vllm_moe_offload.integration.expert_share import ExpertShare
from vllm_moe_offload.integration.speculation import is_draft_model
from vllm_moe_offload.runtime import OffloadRuntime

_library = Library("vllm_moe_offload", "FRAGMENT")
_offloaded_classes: dict[type, type] = {}


Runtime = OffloadRuntime | DeviceRuntime
"""Of a worker: the host plans, layer call by layer call, or looks on between steps."""


class LayerCalls(Protocol):
    """Whoever serves layer calls on a GPU."""

    def forward(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
    ) -> torch.Tensor:
        """As ``forward_modular`` of ``layer``."""


class OffloadedExperts:
    """Mixin over RoutedExperts: parameters are the pool's, ids are slots of it.

    Attributes:
        runtime: the worker's runtime, set once the layer's experts are in the store.
        moe_layer: index among the MoE layers that this worker has.
        share: of the layer's experts, those that this worker has; None: all.
        calls: serves the layer on a GPU; None: the operator of this module does.
    """

    runtime: Runtime | None = None
    moe_layer: int = -1
    share: ExpertShare | None = None
    calls: LayerCalls | None = None
    # Of RoutedExperts, with which this class is mixed.
    layer_name: str
    quant_method: Any
    expert_map: torch.Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As RoutedExperts, with parameters in RAM: vLLM builds models on the device.

        Untouched memory costs nothing; what a layer is loaded into is given to it when its
        turn comes (``loading.py``).
        """
        with torch.device("cpu"):
            super().__init__(*args, **kwargs)
            self.share = ExpertShare.of(self)

    def forward_modular(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As RoutedExperts.forward_modular; x ``[tokens, hidden]``, ids ``[tokens, top_k]``.

        Shared experts are the runner's: it ran them before this call, or on a GPU runs them on
        another stream meanwhile. A kernel runs them itself only with all-to-all communication,
        which is refused.
        """
        if self.calls is not None:
            # In here vLLM's own operator is open already (``vllm::moe_forward``).
            return self.calls.forward(self, x, topk_weights, topk_ids)
        return torch.ops.vllm_moe_offload.forward(
            x, topk_weights, topk_ids, _encode_layer_name(self.layer_name)
        )

    def forward_offloaded(
        self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        """The layer on whatever slots its experts got; in waves if they don't fit at once."""
        runtime = self.runtime
        if not isinstance(runtime, OffloadRuntime):
            raise RuntimeError(f"{self.layer_name} runs before its experts were stored")
        if self.share is not None:
            return self._forward_own(runtime, self.share, x, topk_weights, topk_ids)
        slot_ids = runtime.begin_layer(self.moe_layer, topk_ids, x)
        if slot_ids is None:
            return self._forward_in_waves(runtime, x, topk_weights, topk_ids)
        try:
            return self._apply(x, topk_weights, slot_ids)
        finally:
            runtime.end_layer(self.moe_layer)

    def _forward_own(
        self,
        runtime: OffloadRuntime,
        share: ExpertShare,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
    ) -> torch.Tensor:
        """What this rank's experts give; the ranks' sum is the layer."""
        own_ids = share.own_ids(topk_ids)
        slot_ids = runtime.begin_layer(self.moe_layer, own_ids, x, topk_ids)
        if slot_ids is None:
            return self._forward_in_waves(runtime, x, topk_weights, own_ids)
        try:
            return share.apply(self._apply, x, topk_weights, own_ids, slot_ids)
        finally:
            runtime.end_layer(self.moe_layer)

    def _apply(
        self, x: torch.Tensor, topk_weights: torch.Tensor, slot_ids: torch.Tensor
    ) -> torch.Tensor:
        return apply(self, x, topk_weights, slot_ids)

    def _forward_in_waves(
        self,
        runtime: OffloadRuntime,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
    ) -> torch.Tensor:
        """Sum over subsets of the experts, in float32: equal to plain vLLM up to rounding."""
        total = torch.zeros_like(x, dtype=torch.float32)
        for slot_ids, in_wave in runtime.waves(self.moe_layer, topk_ids):
            weights = torch.where(in_wave, topk_weights, torch.zeros_like(topk_weights))
            total += self._apply(x, weights, slot_ids)
        return total.to(x.dtype)


def offloaded_class(cls: type) -> type:
    """``Offloaded<Name>``: the mixin over a RoutedExperts class."""
    if cls not in _offloaded_classes:
        if cls.__name__ in op_registry_oot:
            raise OptionError(
                f"--moe-offload: {cls.__name__} is replaced by another plugin's "
                f"{op_registry_oot[cls.__name__].__name__}; uninstall that plugin or use "
                "--moe-offload=off"
            )
        own = cls.__dict__.get("forward_modular")
        if own is not None and cls is not RoutedExperts:
            raise OptionError(
                f"--moe-offload: {cls.__name__} has a forward_modular of its own, which the "
                "expert cache cannot stand in for; use --moe-offload=off"
            )
        _offloaded_classes[cls] = type(
            f"Offloaded{cls.__name__}", (OffloadedExperts, cls), {"__module__": __name__}
        )
    return _offloaded_classes[cls]


def instantiate(inherited_new: Any, cls: type, *args: Any, **kwargs: Any) -> Any:
    """``RoutedExperts.__new__``: our class where the configuration asks for offload."""
    vllm_config = get_current_vllm_config_or_none()
    if (
        vllm_config is not None
        and not issubclass(cls, OffloadedExperts)
        and options_of(vllm_config).enabled
        and not is_draft_model(vllm_config)
    ):
        cls = offloaded_class(cls)
    return inherited_new(cls, *args, **kwargs)


def offloaded_layers(model: torch.nn.Module) -> list[Any]:
    """The model's offloaded layers in the order in which they run.

    Raises:
        OptionError: a RoutedExperts that is not ours; names its class.
    """
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, OffloadedExperts):
            layers.append(module)
        elif isinstance(module, RoutedExperts):
            raise OptionError(
                f"--moe-offload: {name} is a {type(module).__name__} that was built without "
                "offload; this model is not supported, use --moe-offload=off"
            )
    return layers


def find_runtime(model: torch.nn.Module) -> Runtime | None:
    """The runtime of a model's offloaded layers, None if it has none."""
    for module in model.modules():
        if isinstance(module, OffloadedExperts):
            return module.runtime
    return None


def _forward(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    layer_name: LayerNameType,
) -> torch.Tensor:
    runner = get_forward_context().no_compile_layers[_resolve_layer_name(layer_name)]
    return runner.routed_experts.forward_offloaded(x, topk_weights, topk_ids)


def _forward_fake(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    layer_name: LayerNameType,
) -> torch.Tensor:
    return torch.empty_like(x)


direct_register_custom_op(
    op_name="forward",
    op_func=_forward,
    fake_impl=_forward_fake,
    target_lib=_library,
    tags=(torch.Tag.needs_fixed_stride_order,),
)
