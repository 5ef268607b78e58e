"""Reading a config.json's fields, with errors that name them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vllm_moe_offload.plan.shapes.base import ShapeError, shown

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
_TOP_K = ("num_experts_per_tok", "experts_per_token")

_MOST = (1 << 31) - 1
"""Of any size or count."""
_MOST_LAYERS = 4096
_MOST_EXPERTS = 4096
_MOST_TOP_K = 64
"""Of what is counted one by one: some ten times what models have."""


class ConfigFields:
    """A config.json's fields, checked: every method raises ShapeError that names a wrong one."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self._config = config
        self._source = source

    def integer(
        self, *names: str, default: int | None = None, least: int = 1, most: int = _MOST
    ) -> int:
        """The first of ``names`` that is there."""
        for name in names:
            value = self._config.get(name)
            if value is None:
                continue
            is_integer = isinstance(value, int) and not isinstance(value, bool)
            if not is_integer or not least <= value <= most:
                raise ShapeError(
                    f"{self._source}: {name}={shown(value)}, must be an integer from {least} "
                    f"to {most}"
                )
            return int(value)
        if default is None:
            raise ShapeError(f"{self._source}: {' or '.join(names)} is missing")
        return default

    def flag(self, name: str, default: bool = False) -> bool:
        """A boolean."""
        value = self._config.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ShapeError(f"{self._source}: {name}={shown(value)}, must be true or false")
        return value

    def has(self, name: str) -> bool:
        """Whether it is there and not null."""
        return self._config.get(name) is not None

    def integers(self, name: str) -> set[int]:
        """A list of integers; empty if it is not there."""
        value = self._config.get(name) or []
        if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
            raise ShapeError(
                f"{self._source}: {name}={shown(value)}, must be a list of integers"
            )
        return set(value)

    def layer_kinds(self, otherwise: Callable[[int], str]) -> list[str]:
        """``layer_types``, or a rule for configs that leave it out."""
        count = self.num_layers()
        kinds = self._config.get("layer_types")
        if kinds is None:
            return [otherwise(layer) for layer in range(count)]
        if not isinstance(kinds, list) or len(kinds) != count:
            raise ShapeError(
                f"{self._source}: layer_types must be a list of num_hidden_layers={count} kinds"
            )
        return [str(kind) for kind in kinds]

    def nested(self, name: str) -> ConfigFields:
        """The fields of an object in it."""
        value = self._config.get(name)
        if not isinstance(value, Mapping):
            raise ShapeError(f"{self._source}: {name}={shown(value)}, must be an object")
        return ConfigFields(value, f"{self._source}: {name}")

    def joined(self, name: str) -> ConfigFields:
        """These fields and those of an object in it, which win; these alone without one."""
        if not self.has(name):
            return self
        return ConfigFields({**self._config, **self.nested(name)._config}, self._source)

    def num_layers(self) -> int:
        """Decoder layers."""
        return self.integer("num_hidden_layers", most=_MOST_LAYERS)

    def num_drafter_layers(self) -> int:
        """Decoder layers behind them, for multi-token prediction."""
        name = "num_nextn_predict_layers"
        return self.integer(name, default=0, least=0, most=_MOST_LAYERS)

    def num_experts(self) -> int:
        """Routed experts of a layer, by the architectures' different names."""
        return self.integer(*_EXPERT_COUNTS, most=_MOST_EXPERTS)

    def top_k(self) -> int:
        """Experts per token, likewise."""
        return self.integer(*_TOP_K, most=_MOST_TOP_K)
