"""What an engine does besides generating: start errors, second starts, off, waves, dummies."""

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.integration.conftest import (
    EXPERTS,
    LAYERS,
    EngineProcess,
    assert_begins_alike,
    engine,
)
from vllm_moe_offload.store.expert_store import CONDEMNED_NAME

pytestmark = pytest.mark.vllm


class Alone(NamedTuple):
    """What became of engines that one process ran in this order, and where their stores are."""

    stores: Path
    blocked: Path
    unused: dict[str, Any]
    off: dict[str, Any]
    too_small: dict[str, Any]
    no_directory: dict[str, Any]
    first: dict[str, Any]
    second: dict[str, Any]
    off_again: dict[str, Any]
    flipped: dict[str, Any]
    flipped_again: dict[str, Any]
    truncated: dict[str, Any]
    flipped_all_cached: dict[str, Any]
    zeros: dict[str, Any]
    zeros_again: dict[str, Any]
    ones: dict[str, Any]
    ones_again: dict[str, Any]


@pytest.fixture(scope="module")
def alone(demo_model, tmp_path_factory) -> Alone:
    """A process of its own, as these engines are about a process's state; one, as it takes long
    to import vLLM."""
    directory = tmp_path_factory.mktemp("alone")
    model, blocked = demo_model("olmoe"), directory / "file"
    blocked.write_text("")

    def offload(cache_gb="50%", store="stores", mode="lrfu"):
        options = {"mode": mode, "cache_gb": cache_gb, "store_dir": str(directory / store)}
        return engine(model, eager=True, offload=options, disable_log_stats=False)

    process = EngineProcess(directory)
    jobs = [
        engine(model, eager=True),
        engine(model, eager=True, offload={"mode": "off"}),
        offload(cache_gb=1e-6),
        offload(store=blocked.name),
        offload(),
        offload(cache_gb="100%"),
        engine(model, eager=True, offload={"mode": "off"}),
    ]
    served = process.run(jobs, may_fail=True)
    for kind in ("flipped", "truncated", "flipped_all_cached", "zeros", "ones"):
        shutil.copytree(directory / "stores", directory / kind)
    for kind in ("flipped", "flipped_all_cached"):
        flip_bytes(experts_of(directory / kind))
    path = experts_of(directory / "truncated")
    os.truncate(path, path.stat().st_size - 4096)
    flipped = offload(store="flipped")
    zeros, ones = (offload(store=kind, mode="trace") for kind in ("zeros", "ones"))
    jobs = [
        flipped,
        flipped,
        offload(store="truncated"),
        offload("100%", "flipped_all_cached"),
        *(zeros | {"overwrite": 0}, zeros),
        *(ones | {"overwrite": 0xFF}, ones),
    ]
    damaged = process.run(jobs, may_fail=True)
    process.stop()
    return Alone(directory / "stores", blocked, *served, *damaged)


def experts_of(store_dir: Path) -> Path:
    """The file of the only store there."""
    (path,) = store_dir.glob("*/whole/experts.bin")
    return path


def flip_bytes(path: Path) -> None:
    """Flips one bit in the middle of every 4 KiB block."""
    data = bytearray(path.read_bytes())
    for offset in range(2048, len(data), 4096):
        data[offset] ^= 1
    path.write_bytes(data)


def test_off_and_unused_leave_vllm_alone(alone):
    """Feature: `off`."""
    untouched = {"classes": ["RoutedExperts"]}
    assert alone.unused["facts"] == alone.off["facts"] == {**untouched, "ranks": [untouched]}
    assert alone.unused["batches"] == alone.off["batches"]
    # The same process serves with offload afterwards: `off` is a matter of configuration.
    assert alone.first["facts"]["classes"] == ["OffloadedRoutedExperts"]


def test_a_second_model_of_a_process_with_off_is_plain_vllms(alone):
    """Feature: `off` in a process that served with offload, and so has vLLM's classes patched."""
    assert alone.second["facts"]["classes"] == ["OffloadedRoutedExperts"]
    assert alone.off_again["facts"] == alone.unused["facts"]
    assert alone.off_again["batches"] == alone.unused["batches"]
    # An engine with offload after it has offload again.
    assert alone.flipped_again["facts"]["classes"] == ["OffloadedRoutedExperts"]


def test_start_errors_are_clear(alone):
    """Feature: options that only a start can find wrong."""
    too_small, no_directory = alone.too_small, alone.no_directory
    assert "cache_gb=1e-06" in too_small["error"] or "cache_gb=1e-06" in too_small["trace"]
    assert "Minimum" in too_small["trace"]
    assert "store_dir" in no_directory["trace"]
    assert str(alone.blocked) in no_directory["trace"]


def test_a_second_start_opens_the_store(alone):
    """Features: the store of an earlier start, also at another capacity; olmoe."""
    assert alone.first["batches"] == alone.second["batches"] == alone.unused["batches"]
    (directory,) = alone.stores.glob("*/whole")
    assert sorted(path.name for path in directory.iterdir()) == ["experts.bin", "manifest.json"]
    for path in directory.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("kind", ["flipped", "flipped_all_cached", "zeros", "ones"])
def test_a_damaged_store_never_serves_wrong_tokens(alone, kind):
    """Features: an expert is checked when it is first read, at the start or while serving: flipped
    bits, and zeros and ones that were written below a server that runs."""
    damaged = getattr(alone, kind)
    assert "batches" not in damaged
    assert "checksum" in damaged["trace"]
    assert "experts.bin" in damaged["trace"]


def test_the_start_after_damage_builds_the_store_again(alone):
    """Features: what reading found, and what opening finds, costs one start."""
    kinds = {
        "flipped": alone.flipped_again,
        "truncated": alone.truncated,
        "zeros": alone.zeros_again,
        "ones": alone.ones_again,
    }
    failed_start = alone.stores.with_name("flipped_all_cached")
    assert experts_of(failed_start).with_name(CONDEMNED_NAME).exists()
    size = experts_of(alone.stores).stat().st_size
    for kind, served in kinds.items():
        assert served["batches"] == alone.unused["batches"]
        rebuilt = experts_of(alone.stores.parent / kind)
        assert rebuilt.stat().st_size == size
        assert sorted(p.name for p in rebuilt.parent.iterdir()) == [
            "experts.bin",
            "manifest.json",
        ]


def test_get_metrics_over_two_engines_of_a_process(alone):
    """Feature: figures of an engine without a server."""
    first, second = alone.first, alone.second
    for name in ("hits", "misses", "read_bytes"):
        assert first["metrics"][name] == first["facts"][name]
        # Counters go on, as those of a worker that was restarted.
        assert second["metrics"][name] == first["facts"][name] + second["facts"][name]
    for run in (first, second):
        assert run["metrics"]["slots"] == run["facts"]["shape"][0]
        assert run["metrics"]["policy_info"] == 1
    assert second["metrics"]["resident_experts"] == EXPERTS * LAYERS


def test_a_cache_smaller_than_a_layer_serves_in_waves(demo_model, share_engines, store_dir):
    """Feature: waves, where not even the experts of one layer fit."""
    model = demo_model("gpt_oss")
    share = f"{100 * (EXPERTS // 2) / (EXPERTS * LAYERS):.12f}%"
    plain, waves = share_engines(
        [
            engine(model, eager=True, dtype="float32"),
            engine(
                model,
                eager=True,
                dtype="float32",
                offload={"mode": "lrfu", "cache_gb": share, "store_dir": str(store_dir)},
            ),
        ]
    )
    assert sum(waves["facts"]["shape"]) == EXPERTS // 2
    assert_begins_alike(waves["batches"][0], plain["batches"][0])


def test_dummy_weights_are_stored_and_served(demo_model, share_engines, tmp_path):
    """Feature: dummy weights; also of more layers than the config.json says, which makes no other
    checkpoint of it."""
    offload = {"mode": "lru", "cache_gb": "50%", "store_dir": str(tmp_path)}
    jobs = [
        engine(
            demo_model("mixtral"),
            eager=True,
            load_format="dummy",
            hf_overrides={"num_hidden_layers": layers},
            offload=offloaded,
        )
        for layers in (LAYERS, LAYERS + 2)
        for offloaded in (None, offload)
    ]
    plain, offloaded, deeper_plain, deeper = share_engines(jobs)
    assert offloaded["batches"] == plain["batches"]
    assert deeper["batches"] == deeper_plain["batches"]
    manifest = json.loads(experts_of(tmp_path).with_name("manifest.json").read_text())
    assert manifest["num_layers"] == LAYERS + 2


def test_embeddings_that_are_not_finite_are_their_requests_trouble(
    demo_model, share_engines, store_dir
):
    """Feature: prompts of embeddings, which a client may fill with anything."""
    model = demo_model("qwen3_moe")
    offload = {"mode": "trace", "cache_gb": "50%", "store_dir": str(store_dir)}
    jobs = [
        engine(model, eager=True, enable_prompt_embeds=True),
        engine(model, eager=True, enable_prompt_embeds=True, offload=offload),
    ]
    plain, offloaded = share_engines(
        [{**job, "embedded": ["nan", "inf", "-inf"]} for job in jobs]
    )
    assert offloaded["batches"] == plain["batches"]
    assert offloaded["facts"]["prefetch_issued"] > 0
