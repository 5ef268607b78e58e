"""The table of well-known models that ships with the package (``known.json``).

Facts from their config.json files: the fields that sizes depend on, with their source.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True, slots=True)
class KnownModel:
    """One entry of the table.

    Attributes:
        name: short name.
        model_id: on the Hugging Face hub.
        source: the file its fields are from.
        config: these fields, as in a config.json.
    """

    name: str
    model_id: str
    source: str
    config: dict[str, Any]


@cache
def known_models() -> dict[str, KnownModel]:
    """The table, by name."""
    text = resources.files(__package__).joinpath("known.json").read_text(encoding="utf-8")
    return {name: KnownModel(name, **entry) for name, entry in json.loads(text).items()}


def find_known(name: str) -> KnownModel | None:
    """The entry of a short name or model id, whatever its case; None if there is none."""
    wanted = name.lower()
    for model in known_models().values():
        repository = model.model_id.lower()
        if wanted in {model.name.lower(), repository, repository.rpartition("/")[2]}:
            return model
    return None
