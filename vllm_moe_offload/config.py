"""The options of the plugin: each declared, validated and documented once.

They travel as ``VllmConfig.additional_config["moe_offload"]``, which reaches every worker
and is part of vLLM's configuration hash.
"""

from __future__ import annotations

import json
import os
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo

Mode = Literal["off", "lru", "lru-layer", "lfu", "lrfu", "trace"]
MODES: tuple[str, ...] = get_args(Mode)
GIB = 1 << 30
MAX_TRACE_GIB = 1 << 20
KEEP_NOTHING = "none"
"""As ``trace_path``."""


class OptionError(ValueError):
    """An option has an impossible value; the message names it and what is allowed."""


def default_store_dir() -> str:
    """``$XDG_CACHE_HOME/vllm-moe-offload``, by default below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return str(Path(base) / "vllm-moe-offload")


class OffloadConfig(BaseModel):
    """Everything a user can set. Field descriptions are the options' reference.

    ``json_schema_extra`` holds what a type does not say: ``unit``, and in ``default`` what a
    default comes to if it is not a constant (:func:`options` reads both).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Annotated[
        Mode,
        Field(
            description="Who stays in the cache. trace: request-level traces decide; lru, "
            "lru-layer, lfu, lrfu: plain policies; off: vLLM untouched. Where a GPU plans by "
            "itself (cuda.md), all modes but off have one rule, that of lrfu."
        ),
    ] = "off"
    cache_gb: Annotated[
        float | str,
        Field(
            description="Fast memory for experts, RAM of a CPU server or a GPU's own, with the "
            "staging slots that the host needs where it plans: a number of GiB, a share of all "
            'experts such as "25%", or "auto" (all experts if they fit beside the KV cache, '
            "else what is left after it).",
            json_schema_extra={"unit": "GiB"},
        ),
    ] = "auto"
    host_gb: Annotated[
        float | str,
        Field(
            description="With a GPU: page-locked host memory for experts: a number of GiB, a "
            'share of all experts such as "50%", or "auto" (all experts if they fit, else what '
            "the system can spare). The GPU plans by itself only if it holds all of them; what "
            "does not fit is read from the store when it is used."
        ),
    ] = "auto"
    store_dir: Annotated[
        str,
        Field(
            description="Directory of the expert store: fast local disk with room for all "
            "experts, owned by you. Built on the first start, opened on later ones.",
            json_schema_extra={
                "default": "$XDG_CACHE_HOME/vllm-moe-offload, or ~/.cache/vllm-moe-offload"
            },
        ),
    ] = Field(default_factory=default_store_dir)
    verify: Annotated[
        bool,
        Field(
            description="Check an expert's checksum whenever it is read from the store, not only "
            "the first time after a start."
        ),
    ] = False
    prefetch: Annotated[
        bool,
        Field(
            description="Whether trace mode reads ahead what the next layers will probably use. "
            "Without effect where a GPU plans by itself."
        ),
    ] = True
    trace_path: Annotated[
        str | None,
        Field(
            description="Where trace mode keeps the activation matrices of finished requests "
            "between starts: a .msgpack file; where experts or layers are divided among workers, "
            'one for each part, its name before the suffix. "none": they are forgotten at exit. '
            "They say what requests were about (security.md).",
            json_schema_extra={
                "default": "activations.msgpack in the model's directory below store_dir"
            },
        ),
    ] = None
    record_trace: Annotated[
        str | None,
        Field(
            description="Write the routing of all requests to this .npz file at exit; with pipeline "
            "parallelism one for each stage, its name before the suffix. Most of the prompts can be "
            "read out of it (security.md).",
            json_schema_extra={"default": "nothing is recorded"},
        ),
    ] = None
    record_trace_limit_gb: Annotated[
        float,
        Field(
            gt=0,
            le=MAX_TRACE_GIB,
            description="Stop recording when the trace holds this much.",
            json_schema_extra={"unit": "GiB"},
        ),
    ] = 4.0
    io_threads: Annotated[
        int,
        Field(
            ge=1,
            le=64,
            description="How many threads read experts from the store.",
            json_schema_extra={"unit": "threads"},
        ),
    ] = 4

    cpu_kernels: Annotated[
        Literal["vllm", "avx512"],
        Field(
            description="For quantised checkpoints on a CPU. vllm: vLLM's own choice, which asks "
            "for AMX; avx512: the same kernels on CPUs with AVX-512 and without AMX too. vLLM "
            "does not test that."
        ),
    ] = "vllm"

    @field_validator("cache_gb", "host_gb")
    @classmethod
    def _check_size(cls, value: float | str) -> float | str:
        parse_cache_size(value)
        return value

    @field_validator("record_trace")
    @classmethod
    def _check_record_trace(cls, value: str | None) -> str | None:
        if value is not None and not value.endswith(".npz"):
            raise ValueError("must end in .npz")
        return value

    @field_validator("trace_path")
    @classmethod
    def _check_trace_path(cls, value: str | None) -> str | None:
        if value not in (None, KEEP_NOTHING) and not value.endswith(".msgpack"):
            raise ValueError('must end in .msgpack, or be "none"')
        return value

    @property
    def enabled(self) -> bool:
        """Whether the plugin does anything at all."""
        return self.mode != "off"


def parse_cache_size(value: float | str) -> tuple[Literal["bytes", "share", "auto"], float]:
    """Kind and amount of a ``cache_gb`` or ``host_gb`` value.

    Kinds: bytes, share of all experts in (0, 1], auto.

    Raises:
        ValueError: not a positive number, percentage or "auto".
    """
    allowed = 'a positive number of GiB, a share such as "25%", or "auto"'
    if isinstance(value, str):
        text = value.strip()
        if text == "auto":
            return "auto", 0.0
        try:
            amount = float(text.removesuffix("%"))
        except ValueError as error:
            raise ValueError(f"allowed: {allowed}") from error
        if text.endswith("%"):
            if not 0 < amount <= 100:
                raise ValueError(f"allowed: {allowed}; a share lies in (0%, 100%]")
            return "share", amount / 100
    else:
        amount = float(value)
    if not 0 < amount < float("inf"):
        raise ValueError(f"allowed: {allowed}")
    return "bytes", amount * GIB


def parse_options(options: Mapping[str, Any]) -> OffloadConfig:
    """Validated options.

    Raises:
        OptionError: names every wrong option, its value and what is allowed.
    """
    if not isinstance(options, Mapping):
        raise OptionError(
            f"moe_offload must be a mapping of options, got {options!r}; "
            f"allowed keys: {', '.join(OffloadConfig.model_fields)}"
        )
    try:
        return OffloadConfig(**options)
    except ValidationError as error:
        raise OptionError(_explain(error)) from None


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        name = str(item["loc"][0])
        if item["type"] == "extra_forbidden":
            lines.append(
                f"moe-offload: unknown option {name!r}; allowed: "
                f"{', '.join(OffloadConfig.model_fields)}"
            )
            continue
        value = item.get("input")
        if name == "mode":
            message = f"allowed: {', '.join(MODES)}"
        else:
            message = str(item["msg"]).removeprefix("Value error, ")
        line = f"moe-offload: {name}={value!r} is not possible: {message}"
        if line not in lines:
            lines.append(line)
    return "\n".join(lines)


# ---- the options as text: what --help and docs/options.md say ----------------------------

_TYPES = {bool: "true or false", int: "integer", float: "number", str: "string"}
_UNITS = {"_gb": "GiB", "_bytes": "bytes", "_tokens": "tokens", "_s": "seconds"}
"""Units by the end of a name, for options that do not declare one."""


@dataclass(frozen=True, slots=True)
class Option:
    """One option as a reader wants it.

    Attributes:
        name: its key in ``--moe-offload-config``.
        description: what it does.
        type: what may be given, with bounds.
        unit: of a bare number; None if it has none.
        default: as it would be typed, or in words.
    """

    name: str
    description: str
    type: str
    unit: str | None
    default: str

    @property
    def summary(self) -> str:
        """One line for ``--help``: always with the default, and the unit if there is one."""
        unit = f"unit: {self.unit}; " if self.unit else ""
        return f"{self.name}: {self.description} ({unit}default: {self.default})"


def options(model: type[OffloadConfig] = OffloadConfig) -> Iterator[Option]:
    """All options, in the order of their declaration.

    Raises:
        TypeError: a field has a type for which there are no words.
    """
    for name, field in model.model_fields.items():
        declared = field.json_schema_extra
        extra = declared if isinstance(declared, dict) else {}
        unit = extra.get("unit") or next(
            (unit for end, unit in _UNITS.items() if name.endswith(end)), None
        )
        default = extra.get("default")
        if default is None:
            value = field.get_default(call_default_factory=True)
            default = "none" if value is None else _typed(value)
        yield Option(
            name,
            field.description or "",
            _type_of(name, field),
            None if unit is None else str(unit),
            str(default),
        )


def _typed(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _type_of(name: str, field: FieldInfo) -> str:
    words = _words(name, field.annotation)
    bounds = {
        bound: getattr(item, bound)
        for item in field.metadata
        for bound in ("gt", "ge", "lt", "le")
        if getattr(item, bound, None) is not None
    }
    if {"ge", "le"} <= bounds.keys():
        return f"{words}, {bounds['ge']} to {bounds['le']}"
    signs = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    return ", ".join([words, *(f"{signs[bound]} {value}" for bound, value in bounds.items())])


def _words(name: str, annotation: Any) -> str:
    if annotation in _TYPES:
        return _TYPES[annotation]
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(str(value) for value in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        return " or ".join(_words(name, part) for part in parts)
    raise TypeError(
        f"option {name} has type {annotation}, for which the reference has no words"
    )
