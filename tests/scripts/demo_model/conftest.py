"""Checkpoints that several tests read and none may change."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.demo_model import ARCHS, write_demo_model
from tests.scripts.demo_model.checkpoints import TINY


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of every architecture."""
    base = tmp_path_factory.mktemp("tiny")
    for arch in ARCHS:
        write_demo_model(base / arch, arch, **TINY)
    return {arch: base / arch for arch in ARCHS}
