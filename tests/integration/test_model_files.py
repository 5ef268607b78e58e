"""Models by a hub's name: from its cache or downloaded, as vLLM does; one store for all names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.hub import COMMIT, make_hub_cache, serve_hub
from tests.integration.conftest import ENGINES, EngineProcess, engine
from vllm_moe_offload.integration.model_files import files_here, model_name, with_config
from vllm_moe_offload.store import checkpoint_fingerprint

LOADED, CACHED = "demo/tiny-moe", "another/tiny-moe"


def config_of(model: Path | str, cache: Path | None = None, revision: str | None = None) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(model=str(model), revision=revision),
        load_config=SimpleNamespace(download_dir=None if cache is None else str(cache)),
    )


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("demo/tiny-moe", "tiny-moe"),
        ("/models/tiny-moe/", "tiny-moe"),
        (f"/hub/models--demo--tiny-moe/snapshots/{COMMIT}", "tiny-moe"),
        (f"/hub/models--tiny-moe/snapshots/{COMMIT}/", "tiny-moe"),
        ("/models/snapshots/tiny-moe", "tiny-moe"),
    ],
)
def test_a_model_is_called_by_its_name_and_not_by_a_commit(model, name):
    assert model_name(model) == name


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_cache_made_by_hand_is_found(demo_model, tmp_path, revision):
    model = demo_model("mixtral")
    snapshot = make_hub_cache(tmp_path, LOADED, model)
    config = config_of(LOADED, tmp_path, revision)
    assert files_here(config) == snapshot
    local = config_of(model)
    assert files_here(local) == with_config(local, local.model_config, model) == model
    assert with_config(config, config.model_config, snapshot) == snapshot
    assert checkpoint_fingerprint(snapshot) == checkpoint_fingerprint(model)


def test_what_is_not_in_the_cache_is_not_here(demo_model, tmp_path):
    make_hub_cache(tmp_path, LOADED, demo_model("mixtral"))
    assert files_here(config_of(CACHED, tmp_path)) is None
    assert files_here(config_of(LOADED, tmp_path, "v2")) is None


@pytest.mark.vllm
def test_by_name_from_a_hub_from_its_cache_and_by_path(
    demo_model, share_engines, store_dir, tmp_path
):
    """Features: a model that is downloaded; one that a cache has; their snapshots."""
    model, cache = demo_model("mixtral"), tmp_path / "huggingface" / "hub"
    make_hub_cache(cache, CACHED, model)
    offload = {"mode": "trace", "cache_gb": "50%", "store_dir": str(tmp_path / "stores")}
    snapshot = cache / "models--demo--tiny-moe" / "snapshots" / COMMIT
    with serve_hub([LOADED, CACHED], model) as hub:
        process = EngineProcess(
            tmp_path,
            {
                **ENGINES,
                "HF_HOME": str(tmp_path / "huggingface"),
                "HF_ENDPOINT": hub.url,
                "HF_HUB_OFFLINE": "0",
                "NO_PROXY": "127.0.0.1",
            },
        )
        results = process.run(
            [engine(name, eager=True, offload=offload) for name in (LOADED, CACHED, snapshot)]
        )
        process.stop()
    assert not [result["trace"] for result in results if "error" in result]
    known = {**offload, "store_dir": str(store_dir)}
    (expected,) = share_engines([engine(model, eager=True, offload=known)])
    assert all(result["batches"] == expected["batches"] for result in results)
    (store,) = (tmp_path / "stores").iterdir()
    assert store.name.startswith("tiny-moe-")
    weights = [request for request in hub.requests if request.endswith(".safetensors")]
    assert [path for path in weights if path.startswith("GET")] == [
        f"GET /{LOADED}/resolve/{COMMIT}/model-00001-of-00001.safetensors"
    ]
