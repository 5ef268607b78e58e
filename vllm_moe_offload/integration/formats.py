"""Which of vLLM's experts can be served from slots, and what each needs.

An expert is a row of every tensor that its layer has once vLLM put it into kernel form, whatever
the number of tensors and their types: weights, scales, zero points, biases. A format is here if its
kernel computes an expert from its row alone, wherever that lies; what is not here is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from vllm.model_executor.utils import weights_already_processed
from vllm.platforms import current_platform

from vllm_moe_offload.cache.layout import ExpertLayout
from vllm_moe_offload.config import OptionError
from vllm_moe_offload.integration import marlin_slots, triton_slots
from vllm_moe_offload.integration.block_slots import ApplyOnSlots
from vllm_moe_offload.integration.patching import require


def _rebuild_processed(method: Any, layer: Any) -> None:
    """Of methods that declare ``supports_pre_processed_weights``.

    By the class's own function: the object's is taken from vLLM's pass over all modules
    (``loading.py``).
    """
    with weights_already_processed():
        type(method).process_weights_after_loading(method, layer)


def _rebuild_wna16(method: Any, layer: Any) -> None:
    require(type(method), "_setup_kernel")
    method._setup_kernel(layer)


def _rebuild_int8(method: Any, layer: Any) -> None:
    from vllm.model_executor.layers.fused_moe.oracle.int8 import make_int8_moe_kernel

    method.moe_quant_config = method.get_fused_moe_quant_config(layer)
    method.moe_kernel = make_int8_moe_kernel(
        int8_backend=method.int8_backend,
        moe_quant_config=method.moe_quant_config,
        moe_config=method.moe,
        experts_cls=method.experts_cls,
        routing_tables=layer._expert_routing_tables(),
    )


def _rebuild_mxfp4(method: Any, layer: Any) -> None:
    from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import make_mxfp4_moe_kernel

    method.moe_quant_config = method.get_fused_moe_quant_config(layer)
    method.moe_kernel = make_mxfp4_moe_kernel(
        moe_quant_config=method.moe_quant_config,
        moe_config=method.moe,
        mxfp4_backend=method.mxfp4_backend,
        experts_cls=method.experts_cls,
        routing_tables=layer._expert_routing_tables(),
    )


def _rebuild_nvfp4(method: Any, layer: Any) -> None:
    from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import make_nvfp4_moe_kernel

    # Weight-only: what activations are scaled by is not there, and asked for all the same.
    layer.w13_input_scale = layer.w2_input_scale = None
    method.moe_quant_config = method.get_fused_moe_quant_config(layer)
    method.moe_kernel = make_nvfp4_moe_kernel(
        moe_quant_config=method.moe_quant_config,
        moe_config=method.moe,
        experts_cls=method.experts_cls,
        backend=method.nvfp4_backend,
        routing_tables=layer._expert_routing_tables(),
    )


Capability = tuple[int, int]
"""Compute capability of a CUDA device, major and minor."""


@dataclass(frozen=True, slots=True)
class ExpertFormat:
    """One way in which vLLM computes routed experts.

    Attributes:
        method: class of the layer's ``quant_method``.
        experts: classes of the method's ``experts_cls``, any of them.
        quantizations: ``ModelConfig.quantization`` of its checkpoints; None: not quantised.
        platform: where they run.
        rebuild: sets the method's kernel up on the layer's parameters as they are, in kernel form;
            called with method and layer.
        apply_on_slots: how the kernel is told where experts lie; None: ids are slots.
        moe_backend: vLLM's name of the kernel, where that has to be asked for.
        least_capability: of a CUDA device.
        packs_on_device: whether weights are put into kernel form by operators of the device.
        aliases: parameters that the kernel finds under a second name, by that name.
    """

    method: str
    experts: tuple[str, ...]
    quantizations: tuple[str | None, ...]
    platform: Literal["cpu", "cuda"]
    rebuild: Callable[[Any, Any], None]
    apply_on_slots: ApplyOnSlots | None = None
    moe_backend: str = "auto"
    least_capability: Capability = (8, 0)
    packs_on_device: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)


_PACKED = {"w13_weight": "w13_weight_packed", "w2_weight": "w2_weight_packed"}
_QWEIGHT = {"w13_weight": "w13_qweight", "w2_weight": "w2_qweight"}
_CPU_UNQUANTIZED = (
    "CPUUnquantizedExperts",
    "X86CPUUnquantizedExperts",
    "ArmCPUUnquantizedExperts",
    "PowerCPUUnquantizedExperts",
)


_WNA16 = (
    ("CompressedTensorsWNA16MoEMethod", ("compressed-tensors",), _PACKED),
    ("AutoGPTQMoEMethod", ("auto_gptq", "gptq"), _QWEIGHT),
    ("AutoAWQMoEMethod", ("auto_awq", "awq"), _QWEIGHT),
)
"""int4 in groups: method, checkpoints, second names."""


def _on_cpu(
    method: str,
    experts: tuple[str, ...],
    quantizations: tuple[str | None, ...],
    rebuild: Callable[[Any, Any], None],
    aliases: Mapping[str, str] | None = None,
) -> ExpertFormat:
    return ExpertFormat(method, experts, quantizations, "cpu", rebuild, aliases=aliases or {})


def _triton(
    method: str, quantizations: tuple[str | None, ...], least_capability: Capability = (8, 0)
) -> ExpertFormat:
    return ExpertFormat(
        method,
        ("TritonExperts",),
        quantizations,
        "cuda",
        _rebuild_processed,
        triton_slots.apply_on_slots,
        "triton",
        least_capability,
    )


def _marlin(
    method: str,
    quantizations: tuple[str | None, ...],
    rebuild: Callable[[Any, Any], None],
    aliases: Mapping[str, str] | None = None,
) -> ExpertFormat:
    return ExpertFormat(
        method,
        ("MarlinExperts",),
        quantizations,
        "cuda",
        rebuild,
        marlin_slots.apply_on_slots,
        "marlin",
        packs_on_device=True,
        aliases=aliases or {},
    )


FORMATS = (
    # bf16, fp16, fp32
    _on_cpu("UnquantizedFusedMoEMethod", _CPU_UNQUANTIZED, (None,), _rebuild_processed),
    _triton("UnquantizedFusedMoEMethod", (None,)),
    # int8 per channel
    _on_cpu(
        "CompressedTensorsW8A8Int8MoEMethod",
        ("CPUExpertsInt8",),
        ("compressed-tensors",),
        _rebuild_int8,
    ),
    # int4 in groups
    *(
        _on_cpu(method, ("CPUExpertsInt4",), names, _rebuild_wna16, aliases)
        for method, names, aliases in _WNA16
    ),
    *(_marlin(method, names, _rebuild_wna16, aliases) for method, names, aliases in _WNA16),
    # fp8 in blocks of 128 x 128
    _on_cpu("Fp8MoEMethod", ("CPUExpertsFp8",), ("fp8",), _rebuild_processed),
    _triton("Fp8MoEMethod", ("fp8",), least_capability=(8, 9)),
    _marlin("Fp8MoEMethod", ("fp8",), _rebuild_processed),
    # MXFP4
    _on_cpu("GptOssMxfp4MoEMethod", ("CPUExpertsMxfp4",), ("gpt_oss_mxfp4",), _rebuild_mxfp4),
    _marlin("GptOssMxfp4MoEMethod", ("gpt_oss_mxfp4",), _rebuild_mxfp4),
    # NVFP4, weights only
    _marlin("ModelOptNvFp4FusedMoE", ("modelopt_fp4",), _rebuild_nvfp4),
    _marlin("CompressedTensorsW4A4Nvfp4MoEMethod", ("compressed-tensors",), _rebuild_nvfp4),
)


def formats_here() -> list[ExpertFormat]:
    """Those of the platform that vLLM runs on."""
    platform = "cuda" if current_platform.is_cuda() else "cpu"
    return [known for known in FORMATS if known.platform == platform]


def problems(quantization: str | None) -> Iterator[str]:
    """What about ``ModelConfig.quantization`` cannot be served here, before layers are built."""
    allowed = {name for known in formats_here() for name in known.quantizations}
    if quantization not in allowed:
        names = sorted(name for name in allowed if name is not None)
        yield (
            f"quantization={quantization!r}: no kernel for such experts is known to compute on "
            f"cache slots; allowed here: {', '.join(('none', *names))}"
        )


def moe_backends(quantization: str | None, capability: Capability) -> list[str]:
    """vLLM's names of the kernels that serve such a checkpoint on a CUDA device, best first."""
    return list(
        dict.fromkeys(
            known.moe_backend
            for known in FORMATS
            if known.platform == "cuda"
            and quantization in known.quantizations
            and capability >= known.least_capability
        )
    )


def format_of(layer: Any) -> ExpertFormat:
    """The format of a RoutedExperts layer.

    Raises:
        OptionError: it is none that can be served from slots; names it, and those that can.
    """
    method = layer.quant_method
    experts = getattr(method.experts_cls, "__name__", str(method.experts_cls))
    if method.is_monolithic:
        raise OptionError(
            f"--moe-offload: the kernel {experts} of {layer.layer_name} does its own routing "
            "(monolithic), so expert ids cannot be mapped to slots. Use --moe-offload=off"
        )
    for known in formats_here():
        if known.method == type(method).__name__ and experts in known.experts:
            return known
    names = sorted({name for known in formats_here() for name in known.experts})
    raise OptionError(
        f"--moe-offload: {layer.layer_name} would run on {experts} ({type(method).__name__}); "
        f"allowed: {', '.join(names)}. Use --moe-offload=off"
    )


def pack(layer: Any, known: ExpertFormat) -> None:
    """Puts a loaded layer into kernel form; through the device where vLLM packs it there.

    Raises:
        OptionError: the device has too little memory for that.
    """
    if not known.packs_on_device:
        layer.quant_method.process_weights_after_loading(layer)
        return
    try:
        _move(layer, current_platform.device_type)
        layer.quant_method.process_weights_after_loading(layer)
        _move(layer, "cpu")
    except torch.OutOfMemoryError as error:
        raise OptionError(
            f"--moe-offload: the GPU has too little memory to pack the experts of "
            f"{layer.layer_name} in, one layer at a time, which the first start with a checkpoint "
            f"does: {error}"
        ) from error


def _move(layer: Any, device: str) -> None:
    for name in expert_parameters(layer):
        parameter = getattr(layer, name)
        parameter.data = parameter.data.to(device)


def take_stored_form(layer: Any, layout: ExpertLayout, known: ExpertFormat) -> None:
    """Gives a layer the parameters that its kernel form has, without any memory.

    vLLM creates them in the checkpoint's form; putting a layer into kernel form changes types and
    shapes, and adds and drops parameters.
    """
    wanted = {spec.name: spec for spec in layout.tensors}
    for name in list(expert_parameters(layer)):
        if name not in wanted:
            delattr(layer, name)
    for name, spec in wanted.items():
        empty = torch.empty((0, *spec.shape), dtype=getattr(torch, spec.dtype), device="cpu")
        layer.register_parameter(name, torch.nn.Parameter(empty, requires_grad=False))
    for alias, name in known.aliases.items():
        layer.register_parameter(alias, getattr(layer, name))


NOT_EXPERT_TENSORS = frozenset({"e_score_correction_bias", "hash_indices_table"})
"""Parameters of RoutedExperts that are not rows per expert (vLLM lists them likewise in
``RoutedExperts.get_expert_weights``)."""


def expert_parameters(layer: Any) -> Iterator[str]:
    """Names of a layer's parameters with a row per expert, each tensor under its first name."""
    for name, _ in layer.named_parameters(recurse=False):
        if name not in NOT_EXPERT_TENSORS:
            yield name
