"""When the runtime starts: with the last of a worker's models."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.stores import build, layout_of
from vllm_moe_offload.config import OffloadConfig, OptionError
from vllm_moe_offload.integration import worker_load
from vllm_moe_offload.integration.worker_load import LoadedExperts
from vllm_moe_offload.store import ExpertStore

OPTIONS = OffloadConfig(mode="trace")


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the runtime was started with: store, layers, the drafter's."""
    noted: list[Any] = []

    def start_runtime(
        config: Any,
        options: Any,
        store: ExpertStore,
        layers: Any,
        *,
        routers: Any,
        draft_layers: Any,
    ) -> None:
        noted.append((store, layers, draft_layers))

    monkeypatch.setattr(worker_load, "start_runtime", start_runtime)
    monkeypatch.setattr(worker_load, "loads_a_drafter", lambda config: config.drafts)
    return noted


def experts(store: ExpertStore) -> LoadedExperts:
    layer = SimpleNamespace(quant_method=None, is_rebuilt=False)
    known: Any = SimpleNamespace(
        rebuild=lambda method, layer: setattr(layer, "is_rebuilt", True)
    )
    return LoadedExperts([layer], [known], store, None)


def test_without_a_drafter_at_once(tmp_path: Path, starts: list[Any]) -> None:
    loaded = experts(build(tmp_path))
    worker_load.model_is_loaded(SimpleNamespace(drafts=False), OPTIONS, loaded)
    assert starts == [(loaded.store, loaded.layers, [])]
    assert loaded.layers[0].is_rebuilt


@pytest.mark.parametrize("has_experts", [True, False])
def test_with_a_drafter_after_it(tmp_path: Path, starts: list[Any], has_experts: bool) -> None:
    config = SimpleNamespace(drafts=True)
    model = experts(build(tmp_path))
    drafter = experts(build(tmp_path, num_layers=1, stages=(3,))) if has_experts else None
    worker_load.model_is_loaded(config, OPTIONS, model)
    assert starts == []
    worker_load.drafter_is_loaded(config, OPTIONS, drafter)
    ((store, layers, draft_layers),) = starts
    assert layers == model.layers
    assert draft_layers == (drafter.layers if drafter else [])
    assert store.num_layers == 3 + has_experts
    assert all(layer.is_rebuilt for layer in [*layers, *draft_layers])


def test_experts_of_another_form_are_refused(tmp_path: Path, starts: list[Any]) -> None:
    config = SimpleNamespace(drafts=True)
    worker_load.model_is_loaded(config, OPTIONS, experts(build(tmp_path)))
    other = experts(build(tmp_path, layout_of(8192), stages=(3,)))
    with pytest.raises(OptionError, match="do not fit beside the model's in one cache"):
        worker_load.drafter_is_loaded(config, OPTIONS, other)
    assert starts == []


def test_a_drafter_with_experts_needs_a_model_with_some(
    tmp_path: Path, starts: list[Any]
) -> None:
    """In its own stage: of another engine's model nothing is taken."""
    worker_load.model_is_loaded(SimpleNamespace(drafts=True), OPTIONS, experts(build(tmp_path)))
    other = SimpleNamespace(drafts=True)
    worker_load.drafter_is_loaded(other, OPTIONS, None)
    drafter = experts(build(tmp_path, stages=(3,)))
    with pytest.raises(OptionError, match="the model has none in this pipeline stage"):
        worker_load.drafter_is_loaded(other, OPTIONS, drafter)
    assert starts == []


def test_a_model_whose_drafter_never_came_is_forgotten(
    tmp_path: Path, starts: list[Any]
) -> None:
    """The next engine of a process does not serve it."""
    worker_load.model_is_loaded(SimpleNamespace(drafts=True), OPTIONS, experts(build(tmp_path)))
    second = experts(build(tmp_path, vllm_version="0.33.0"))
    config = SimpleNamespace(drafts=True)
    worker_load.model_is_loaded(config, OPTIONS, second)
    worker_load.drafter_is_loaded(config, OPTIONS, None)
    assert [store for store, _, _ in starts] == [second.store]
