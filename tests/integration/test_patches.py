"""The patches on the real classes of the installed vLLM: what is patched, and what is refused."""

import ast
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import vllm.v1.worker.gpu.model_runner as v2
import vllm.v1.worker.gpu_model_runner as v1

from scripts.write_patches import blocks
from vllm_moe_offload.integration import patches, patching

RUNNERS = [v1.GPUModelRunner, v2.GPUModelRunner]
PLACES = sorted({(place.file, place.owner) for block in blocks() for place in block.places})


@pytest.fixture
def patched(monkeypatch):
    """The runners with the plugin's patches; afterwards vLLM's own again."""
    for runner in RUNNERS:
        for name, method in list(vars(runner).items()):
            if callable(method):
                monkeypatch.setattr(runner, name, method)
    patches.install_runner_patches()


@pytest.mark.parametrize("runner", RUNNERS, ids=["v1", "v2"])
def test_weights_are_not_reloaded_into_rows_of_other_experts(patched, runner):
    offloaded = SimpleNamespace(_moe_offload_runtime=object())
    with pytest.raises(NotImplementedError, match="reload_weights is not possible"):
        runner.reload_weights(offloaded, weights_path="/new/weights")


@pytest.mark.parametrize("runner", RUNNERS, ids=["v1", "v2"])
def test_a_model_without_offload_reloads_as_ever(patched, runner, monkeypatch):
    reloaded = []
    for module in (v1, v2):
        monkeypatch.setattr(module, "reload_weights", lambda *_, **__: reloaded.append(True))
    plain = SimpleNamespace(
        _moe_offload_runtime=None,
        vllm_config=None,
        get_model=lambda: None,
        reset_lora_state=lambda: None,
        reset_encoder_cache=lambda: None,
        reset_mm_cache=lambda: None,
    )
    runner.reload_weights(plain)
    assert reloaded == [True]


@pytest.mark.parametrize("runner", RUNNERS, ids=["v1", "v2"])
def test_a_runner_without_a_method_that_is_patched_is_an_unknown_vllm(runner, monkeypatch):
    monkeypatch.delattr(runner, "reload_weights")
    with pytest.raises(patching.UnsupportedVLLM, match=r"GPUModelRunner\.reload_weights"):
        patching.wrap(runner, "reload_weights", lambda original, *_: None)


@pytest.mark.parametrize("version", ["0.32.0", "0.33.0rc1", "0.33.1+cpu"])
def test_versions_that_are_supported(version, monkeypatch):
    monkeypatch.setattr(patching, "vllm_version", lambda: version)
    patching.check_version()


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("0.31.2", r"supports vllm>=0\.32,<0\.34, but vLLM 0\.31\.2 is installed"),
        ("0.34.0rc1", r"vLLM 0\.34\.0rc1 is installed"),
        ("main", "cannot read the version of vLLM: 'main'"),
    ],
)
def test_versions_that_are_not(version, message, monkeypatch):
    monkeypatch.setattr(patching, "vllm_version", lambda: version)
    with pytest.raises(patching.UnsupportedVLLM, match=message):
        patching.check_version()


@pytest.mark.parametrize(("file", "owner"), PLACES)
def test_what_the_page_says_is_patched_is_where_it_says(file, owner):
    package = find_spec("vllm").submodule_search_locations[0]
    path = next(
        path for path in (Path(package, file), Path(package).parent / file) if path.exists()
    )
    classes = {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    module = path.parent.name if path.stem == "__init__" else path.stem
    assert owner in classes or owner == module
