"""The options as text: what ``--help`` and ``docs/options.md`` say, from one declaration."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from vllm_moe_offload.config import OffloadConfig

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
