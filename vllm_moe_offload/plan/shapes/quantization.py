"""``quantization_config`` of a config.json: the experts' format, and what is not quantised."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_moe_offload.plan.shapes.base import SERVED_BYTES, ShapeError, shown
from vllm_moe_offload.plan.shapes.kernel_form import (
    BF16,
    FP8_BLOCK,
    GROUP_SIZES,
    NVFP4_BLOCK,
    ExpertFormat,
)

_Entry = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Quantization:
    """What a checkpoint is quantised to.

    Attributes:
        method: ``quant_method``; empty for a checkpoint that is not quantised.
        experts: format of its routed experts; None: none that is served.
        refusal: why, naming the value and what is allowed; empty if it is served.
        kept: names and patterns of modules that are not quantised.
    """

    method: str = ""
    experts: ExpertFormat | None = BF16
    refusal: str = ""
    kept: tuple[str, ...] = ()

    def dense_bytes_of(self, module: str) -> float:
        """Bytes of one weight of dense modules, scales included.

        Args:
            module: regular expression that their names match, such as ``attn``.
        """
        if not self.method or any(re.search(module, name) for name in self.kept):
            return SERVED_BYTES
        return _dense_bytes(self.experts)


NOT_QUANTIZED = Quantization()


class _Refused(Exception):
    """A format that is not served; the message names it and what is."""


def quantization_of(config: Mapping[str, Any], source: str) -> Quantization:
    """Of a config.json; ``quantization`` is what MLX calls it.

    Raises:
        ShapeError: it is no object.
    """
    entry = config.get("quantization_config") or config.get("quantization")
    if not entry:
        return NOT_QUANTIZED
    if not isinstance(entry, Mapping):
        raise ShapeError(f"{source}: quantization_config={shown(entry)}, must be an object")
    method = str(entry.get("quant_method", "unnamed"))
    kept = _kept(entry)
    try:
        if method not in _METHODS:
            raise _Refused(f"quant_method={shown(method)}, must be {_or(_METHODS)}")
        for name in kept:
            if _names_served_experts(name, config.get("num_hidden_layers")):
                raise _Refused(f"{shown(name)} is not quantised, must not name routed experts")
        if method == "mxfp4" and config.get("model_type") != "gpt_oss":
            raise _Refused("quant_method='mxfp4' is served of gpt_oss models alone")
        return Quantization(method, _METHODS[method](entry), kept=kept)
    except _Refused as refused:
        return Quantization(method, None, f"quantization_config: {refused}", kept)


def _fp8(entry: _Entry) -> ExpertFormat:
    block = entry.get("weight_block_size")
    _require("weight_block_size", block, [[FP8_BLOCK, FP8_BLOCK]])
    return ExpertFormat("fp8")


def _mxfp4(entry: _Entry) -> ExpertFormat:
    del entry
    return ExpertFormat("mxfp4")


def _gptq(entry: _Entry) -> ExpertFormat:
    _require("bits", entry.get("bits"), [4])
    _require("sym", entry.get("sym"), [True])
    _require("desc_act", entry.get("desc_act", False), [False])
    for pattern, changes in _mapping(entry.get("dynamic")).items():
        if not pattern.startswith("-:") and changes:
            raise _Refused(
                f"dynamic has {shown(pattern)}: {shown(changes)}, must only leave modules "
                "out ('-:...')"
            )
    return ExpertFormat("int4", "gptq", _group_size(entry))


def _awq(entry: _Entry) -> ExpertFormat:
    _require("bits", entry.get("bits", entry.get("w_bit")), [4])
    _require("zero_point", entry.get("zero_point"), [True])
    group_size = _group_size(entry, "group_size" if "group_size" in entry else "q_group_size")
    return ExpertFormat("int4", "awq", group_size, has_zero_points=True)


def _compressed_tensors(entry: _Entry) -> ExpertFormat:
    group = _group_of_experts(_mapping(entry.get("config_groups")).values())
    weights, inputs = _mapping(group.get("weights")), group.get("input_activations")
    storage = group.get("format") or entry.get("format")
    _require("format", storage, ["pack-quantized", "int-quantized", "nvfp4-pack-quantized"])
    if storage == "nvfp4-pack-quantized":
        return ExpertFormat("nvfp4", "compressed-tensors")
    _require("weights.type", weights.get("type", "int"), ["int"])
    if storage == "int-quantized":
        _require("weights.num_bits", weights.get("num_bits"), [8])
        _require("weights.strategy", weights.get("strategy"), ["channel"])
        _require("weights.symmetric", weights.get("symmetric", True), [True])
        activations = _mapping(inputs)
        _require("input_activations.num_bits", activations.get("num_bits"), [8])
        _require("input_activations.strategy", activations.get("strategy"), ["token"])
        _require("input_activations.dynamic", activations.get("dynamic"), [True])
        return ExpertFormat("int8")
    _require("weights.num_bits", weights.get("num_bits"), [4])
    _require("weights.strategy", weights.get("strategy"), ["group"])
    _require("weights.actorder", weights.get("actorder"), [None, "weight", "static"])
    _require("input_activations", inputs, [None])
    is_symmetric = _require("weights.symmetric", weights.get("symmetric", True), [True, False])
    return ExpertFormat(
        "int4",
        "compressed-tensors",
        _group_size(weights),
        has_zero_points=not is_symmetric,
    )


def _modelopt(entry: _Entry) -> ExpertFormat:
    described = _mapping(entry.get("quantization")) or entry
    algorithm = str(described.get("quant_algo", "")).upper()
    _require("quant_algo", algorithm, ["NVFP4", "W4A16_NVFP4"])
    return ExpertFormat("nvfp4", "modelopt")


def _group_of_experts(groups: Iterable[Any]) -> _Entry:
    """The one of ``config_groups`` that routed experts are in."""
    found = [_mapping(group) for group in groups]
    named = [group for group in found if "experts" in str(group.get("targets"))]
    linear = [group for group in found if "Linear" in _list(group.get("targets"))]
    for some in (named, linear):
        if len(some) == 1:
            return some[0]
    raise _Refused("config_groups must have one group whose targets are experts or 'Linear'")


_METHODS: dict[str, Callable[[_Entry], ExpertFormat]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "mxfp4": _mxfp4,
    "modelopt": _modelopt,
}
"""By ``quant_method``."""


def _kept(entry: _Entry) -> tuple[str, ...]:
    names: list[str] = []
    for key in ("modules_to_not_convert", "ignored_layers", "ignore"):
        names += map(str, _list(entry.get(key)))
    names += (name for name in _mapping(entry.get("dynamic")) if name.startswith("-:"))
    return tuple(names)


def _names_served_experts(name: str, num_layers: Any) -> bool:
    """Whether a module that is not quantised is routed experts, of a layer that is served."""
    if name.startswith("mtp") or not re.search(r"\bexperts\b", name):  # not shared_experts
        return False
    layer = re.search(r"\blayers\.(\d{1,9})\b", name)
    return layer is None or not isinstance(num_layers, int) or int(layer[1]) < num_layers


def _dense_bytes(experts: ExpertFormat | None) -> float:
    """Bytes of one quantised weight of a dense module, scales included."""
    if experts is None:
        return SERVED_BYTES
    if experts.kind == "fp8":
        return 1 + 4 / FP8_BLOCK**2
    if experts.kind == "int4":
        scales = 2 + (0.5 if experts.has_zero_points else 0)
        return 0.5 + scales / experts.group_size
    if experts.kind == "nvfp4":
        return 0.5 + 1 / NVFP4_BLOCK
    # MXFP4 is for experts alone.
    return 1 if experts.kind == "int8" else SERVED_BYTES


def _group_size(entry: _Entry, name: str = "group_size") -> int:
    return int(_require(name, entry.get(name), list(GROUP_SIZES)))


def _require(name: str, value: Any, allowed: list[Any]) -> Any:
    if value not in allowed:
        raise _Refused(f"{name}={shown(value)}, must be {_or(map(repr, allowed))}")
    return value


def _mapping(value: Any) -> _Entry:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _or(values: Iterable[str]) -> str:
    return " or ".join(values)
