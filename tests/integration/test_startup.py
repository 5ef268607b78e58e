"""Where a worker keeps its activation matrices, if it does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_moe_offload.config import OffloadConfig
from vllm_moe_offload.integration import startup
from vllm_moe_offload.policy import make_policy
from vllm_moe_offload.rank import Rank


@pytest.fixture
def store(tmp_path: Path, monkeypatch) -> SimpleNamespace:
    """Of a worker that has the whole model."""
    monkeypatch.setattr(startup, "first_slice_here", lambda _: 0)
    identity = SimpleNamespace(rank=Rank(), checkpoint="model")
    directory = tmp_path / "model-0123456789abcdef" / "whole"
    directory.mkdir(parents=True)
    return SimpleNamespace(directory=directory, identity=identity)


def test_beside_the_store_unless_another_file_is_named(store, tmp_path: Path) -> None:
    paths = {None: store.directory.parent / "activations.msgpack"}
    paths[str(tmp_path / "a.msgpack")] = tmp_path / "a.msgpack"
    for trace_path, path in paths.items():
        options = OffloadConfig(mode="trace", trace_path=trace_path)
        file = startup._collection_file(options, store, make_policy("trace", 2, 4), [])
        assert file is not None
        assert file.path == path
        file.close()


def test_nothing_of_requests_is_kept_if_asked(store, tmp_path: Path) -> None:
    options = OffloadConfig(mode="trace", trace_path="none")
    policy = make_policy("trace", 2, 4)
    assert startup._collection_file(options, store, policy, []) is None
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == []
