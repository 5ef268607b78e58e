"""What is checked before a process starts, beyond the messages of tests/messages/serve.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scripts.demo_model import write_demo_model
from scripts.quantize import quantize
from tests.hub import make_hub_cache
from tests.integration.conftest import SHAPE
from tests.messages.serve import weights, without_a_file
from tests.stores import build
from vllm_moe_offload.cache.planner import CacheShape
from vllm_moe_offload.config import GIB, OffloadConfig, OptionError
from vllm_moe_offload.integration import patching, preflight
from vllm_moe_offload.integration.startup import sizing_line
from vllm_moe_offload.plan.shapes import ExpertFormat, ExpertShape, kernel_form
from vllm_moe_offload.plan.ways import Way
from vllm_moe_offload.rank import Rank
from vllm_moe_offload.store import checkpoint_fingerprint, room

EXPERT_BYTES = 3 * SHAPE["hidden"] * SHAPE["intermediate"] * 2
NUM_EXPERTS = SHAPE["experts"]


@pytest.fixture
def model(demo_model, tmp_path) -> Path:
    """A copy, to be spoilt."""
    return Path(shutil.copytree(demo_model("mixtral"), tmp_path / "model"))


def config_of(
    model: Path | str, *, ranks: int = 1, parallel: dict[str, Any] | None = None, **load: Any
) -> Any:
    """``ranks``: tensor parallel; ``parallel``: other fields of vLLM's ParallelConfig."""
    load = {"load_format": "auto", "download_dir": None, **load}
    fields = {
        "tensor_parallel_size": ranks,
        "pipeline_parallel_size": 1,
        "enable_expert_parallel": False,
        "use_ray": False,
        "nnodes": 1,
        "node_rank": 0,
        **(parallel or {}),
    }
    return SimpleNamespace(
        model_config=SimpleNamespace(model=str(model), revision=None, dtype=torch.bfloat16),
        load_config=SimpleNamespace(**load),
        parallel_config=SimpleNamespace(**fields),
    )


def check(config: Any, tmp_path: Path, **options: Any) -> None:
    options = {"mode": "trace", "store_dir": str(tmp_path / "stores"), **options}
    preflight.check(config, OffloadConfig(**options))


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_least_cache_is_what_one_rank_needs(model, tmp_path, ranks):
    least = 2 * EXPERT_BYTES / ranks
    check(config_of(model, ranks=ranks), tmp_path, cache_gb=least / GIB)
    with pytest.raises(OptionError, match=f"of {EXPERT_BYTES // ranks} bytes, but one token"):
        check(config_of(model, ranks=ranks), tmp_path, cache_gb=0.99 * least / GIB)


@pytest.mark.parametrize("ranks", [1, 2])
def test_quantised_experts_are_those_of_the_kernel(demo_model, tmp_path, ranks):
    plain = tmp_path / "plain"
    shape = {"layers": 2, "experts": 8, "top_k": 2, "hidden": 512, "intermediate": 256}
    write_demo_model(plain, "qwen3_moe", **shape)
    quantize(plain, tmp_path / "int4", "int4")
    expert = ExpertShape(512, 256 // ranks)
    layout = kernel_form(ExpertFormat("int4", "compressed-tensors", 128), "cpu", expert)
    config = config_of(tmp_path / "int4", ranks=ranks)
    least = 2 * layout.expert_bytes / GIB
    check(config, tmp_path, cache_gb=least)
    with pytest.raises(OptionError, match=f"of {layout.expert_bytes} bytes, but one token"):
        check(config, tmp_path, cache_gb=0.99 * least)


EXPERT_PARALLEL = {"enable_expert_parallel": True}


def test_expert_parallel_ranks_need_whole_experts(model, tmp_path):
    config = config_of(model, ranks=2, parallel=EXPERT_PARALLEL)
    least = 2 * EXPERT_BYTES / GIB
    check(config, tmp_path, cache_gb=least)
    with pytest.raises(OptionError, match=f"of {EXPERT_BYTES} bytes, but one token needs 2"):
        check(config, tmp_path, cache_gb=0.99 * least)


def test_ranks_with_one_expert_of_a_layer_need_no_more(model, tmp_path):
    config = config_of(model, ranks=NUM_EXPERTS, parallel=EXPERT_PARALLEL)
    check(config, tmp_path, cache_gb=EXPERT_BYTES / GIB)
    with pytest.raises(OptionError, match="but one token needs 1"):
        check(config, tmp_path, cache_gb=0.99 * EXPERT_BYTES / GIB)


def test_a_share_of_the_cache_is_of_a_ranks_own_experts(model, tmp_path, monkeypatch):
    two_of_all = "8.34%"  # of three layers of eight
    check(config_of(model), tmp_path, cache_gb=two_of_all)
    config = config_of(model, parallel={"pipeline_parallel_size": 2})
    two_layers = 2 * NUM_EXPERTS
    with pytest.raises(OptionError, match=f"holds 1 of {two_layers} experts of"):
        check(config, tmp_path, cache_gb=two_of_all)
    # Enough for the first stage, which has two of the three layers, and not for the second.
    with pytest.raises(OptionError, match=f"holds 1 of {NUM_EXPERTS} experts of"):
        check(config, tmp_path, cache_gb="12.5%")
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "1,2")
    with pytest.raises(OptionError, match=f"holds 0 of {NUM_EXPERTS} experts of"):
        check(config, tmp_path, cache_gb=two_of_all)


def test_a_stage_without_experts_needs_nothing(demo_model, tmp_path):
    """DeepSeek's first layer has none."""
    stages = {"pipeline_parallel_size": SHAPE["layers"]}
    config = config_of(demo_model("deepseek_v2"), parallel=stages)
    check(config, tmp_path, cache_gb="100%")


def test_slices_that_no_kernel_takes_are_left_to_the_worker(tmp_path):
    plain = tmp_path / "plain"
    shape = {"layers": 2, "experts": 8, "top_k": 2, "hidden": 512, "intermediate": 256}
    write_demo_model(plain, "qwen3_moe", **shape)
    quantize(plain, tmp_path / "fp8", "fp8")
    check(config_of(tmp_path / "fp8", ranks=4), tmp_path, cache_gb=1e-9)
    with pytest.raises(OptionError, match="one token needs 2"):
        check(
            config_of(tmp_path / "fp8", ranks=4, parallel=EXPERT_PARALLEL),
            tmp_path,
            cache_gb=1e-9,
        )


def test_quantised_experts_that_plan_cannot_count_are_left_to_the_worker(model, tmp_path):
    path = model / "config.json"
    other = {"quantization_config": {"quant_method": "torchao"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | other))
    check(config_of(model), tmp_path, cache_gb=1e-9)


def test_dummy_weights_need_no_files(model, tmp_path):
    weights(model).unlink()
    check(config_of(model, load_format="dummy"), tmp_path)
    with pytest.raises(OptionError, match="holds no safetensors files"):
        check(config_of(model), tmp_path)


def test_what_a_hub_has_still_to_send_is_not_missing(model, tmp_path):
    without_a_file(model)
    with pytest.raises(OptionError, match="is incomplete: 1 of 2 files"):
        check(config_of(model), tmp_path)
    make_hub_cache(tmp_path / "hub", "demo/tiny", model)
    hub = str(tmp_path / "hub")
    check(config_of("demo/tiny", download_dir=hub), tmp_path)
    check(
        config_of("demo/other", download_dir=hub), tmp_path, cache_gb=1e-9
    )  # nothing is known
    with pytest.raises(OptionError, match="one token needs 2"):
        check(config_of("demo/tiny", download_dir=hub), tmp_path, cache_gb=1e-9)


def test_an_architecture_that_plan_does_not_know_is_left_to_the_worker(model, tmp_path):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "new"}))
    check(config_of(model), tmp_path, cache_gb=1e-9)


# ---- disk room ---------------------------------------------------------------------------


@pytest.fixture
def fill_disk(monkeypatch):
    """After it was called, nothing is free."""
    return lambda: monkeypatch.setattr(room, "free_bytes", lambda _: 0)


def test_a_store_that_is_there_needs_no_room(model, tmp_path, fill_disk):
    fingerprint = checkpoint_fingerprint(model)
    store = build(
        tmp_path / "stores", checkpoint=fingerprint, vllm_version=patching.vllm_version()
    )
    fill_disk()
    check(config_of(model), tmp_path)
    shutil.rmtree(store.directory)
    with pytest.raises(OptionError, match=r"it needs 2359296 bytes; 0 are free; set store_dir"):
        check(config_of(model), tmp_path)


def test_rays_workers_look_for_room_where_they_are(model, tmp_path, fill_disk):
    config = config_of(model, ranks=2)
    fill_disk()
    with pytest.raises(OptionError, match="are free; set store_dir"):
        check(config, tmp_path)
    config.parallel_config.use_ray = True
    check(config, tmp_path)


@pytest.mark.parametrize(
    "difference",
    [{"checkpoint": "another"}, {"vllm_version": "0.1"}, {"rank": Rank(tp_size=2)}],
)
def test_a_store_of_something_else_is_none(model, tmp_path, fill_disk, difference):
    known = {
        "checkpoint": checkpoint_fingerprint(model),
        "vllm_version": patching.vllm_version(),
    }
    build(tmp_path / "stores", **{**known, **difference})
    fill_disk()
    with pytest.raises(OptionError, match="are free; set store_dir"):
        check(config_of(model), tmp_path)


TENSOR, PIPELINE = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}


@pytest.mark.parametrize(
    ("parallel", "layers_of_nodes"),
    [
        (TENSOR, (1.5, 1.5)),
        (TENSOR | EXPERT_PARALLEL, (1.5, 1.5)),
        (PIPELINE, (2, 1)),
        (TENSOR | PIPELINE, (2, 1)),
    ],
    ids=str,
)
def test_room_is_needed_for_the_ranks_of_this_machine(
    model, tmp_path, fill_disk, parallel, layers_of_nodes
):
    fill_disk()
    layer_bytes = NUM_EXPERTS * EXPERT_BYTES
    whole = SHAPE["layers"] * layer_bytes
    with pytest.raises(OptionError, match=f"it needs {whole} bytes; 0 are free"):
        check(config_of(model, parallel=parallel), tmp_path)
    for node, layers in enumerate(layers_of_nodes):
        here = parallel | {"nnodes": 2, "node_rank": node}
        with pytest.raises(OptionError, match=f"it needs {int(layers * layer_bytes)} bytes;"):
            check(config_of(model, parallel=here), tmp_path)


def test_only_ray_knows_which_ranks_are_here(model, tmp_path, fill_disk):
    fill_disk()
    check(config_of(model, ranks=2, parallel={"use_ray": True}), tmp_path)


def test_every_rank_that_is_here_must_have_its_part(model, tmp_path, fill_disk):
    known = {
        "checkpoint": checkpoint_fingerprint(model),
        "vllm_version": patching.vllm_version(),
    }
    parts = [Rank(ep=ep, ep_size=2) for ep in range(2)]
    stores = [build(tmp_path / "stores", **known, rank=rank) for rank in parts]
    # `build` names the model itself; the parts of one server lie beside each other.
    assert stores[0].directory.parent == stores[1].directory.parent
    fill_disk()
    here = EXPERT_PARALLEL | {"nnodes": 2}
    check(config_of(model, ranks=2, parallel=EXPERT_PARALLEL), tmp_path)
    with pytest.raises(OptionError, match="are free; set store_dir"):
        check(config_of(model, ranks=2), tmp_path)  # slices, not experts
    shutil.rmtree(stores[1].directory)
    check(config_of(model, ranks=2, parallel=here | {"node_rank": 0}), tmp_path)
    for other in (EXPERT_PARALLEL, here | {"node_rank": 1}):
        with pytest.raises(OptionError, match="are free; set store_dir"):
            check(config_of(model, ranks=2, parallel=other), tmp_path)


def test_what_a_killed_build_left_is_room(model, tmp_path, fill_disk):
    left = tmp_path / "stores" / "model-0123456789abcdef" / "whole.building-1-aa"
    left.mkdir(parents=True, mode=0o700)
    (left / "experts.bin").write_bytes(bytes(20 << 20))
    fill_disk()
    check(config_of(model), tmp_path)


# ---- what a start says -------------------------------------------------------------------


def test_the_sizing_line_says_what_fits_or_what_to_change():
    size = GIB // 10
    everything, some = CacheShape(2, 8, 16), CacheShape(2, 8, 6, 2)
    assert sizing_line("auto", everything, size, Way.HOST) == (
        "all experts fit: cache_gb=auto -> 1.60 GiB, a slot for each of 16"
    )
    assert sizing_line("auto", everything, size, Way.RESIDENT) == (
        "all experts fit: cache_gb=auto -> 1.60 GiB, a slot for each of 16; layer calls are "
        "vLLM's own"
    )
    staged = (
        "cache_gb=50% -> 0.80 GiB: 6 cache slots (38% of all experts) + 2 staging slots; all of "
        "them: --moe-offload-config.cache_gb 1.6"
    )
    assert sizing_line("50%", some, size, Way.HOST) == staged
    assert sizing_line("50%", some, size, Way.HOST, "experts are quantised (fp8)") == (
        f"{staged}; the host plans, without CUDA graphs: experts are quantised (fp8)"
    )
    assert sizing_line("50%", CacheShape(2, 8, 8), size, Way.DEVICE) == (
        "cache_gb=50% -> 0.80 GiB: 8 cache slots (50% of all experts); all of them: "
        "--moe-offload-config.cache_gb 1.6; the GPU plans, by the rule of lrfu, inside vLLM's own "
        "CUDA graphs"
    )
