"""What an engine does besides generating: start errors, second starts, off, waves, dummies."""

import os
import shutil
import stat
from pathlib import Path

import pytest

from tests.integration.conftest import EXPERTS, LAYERS, engine

pytestmark = pytest.mark.vllm


def test_off_and_unused_leave_vllm_alone(demo_model, run_engines, store_dir):
    model = demo_model("mixtral")
    unused, off, on = run_engines(
        [
            engine(model, eager=True),
            engine(model, eager=True, offload={"mode": "off"}),
            engine(model, eager=True, offload={"mode": "lru", "store_dir": str(store_dir)}),
        ]
    )
    assert unused["facts"] == off["facts"] == {"classes": ["RoutedExperts"]}
    assert unused["batches"] == off["batches"]
    # The same process serves with offload afterwards: `off` is a matter of configuration.
    assert on["facts"]["classes"] == ["OffloadedRoutedExperts"]


def test_start_errors_are_clear_and_second_start_opens(demo_model, run_engines, tmp_path):
    model = demo_model("mixtral")
    stores = tmp_path / "stores"
    blocked = tmp_path / "file"
    blocked.write_text("")

    def offload(**options):
        return engine(
            model, eager=True, offload={"mode": "trace", "store_dir": str(stores), **options}
        )

    too_small, no_directory, first, second = run_engines(
        [
            offload(cache_gb=1e-6),
            offload(store_dir=str(blocked)),
            offload(cache_gb="50%"),
            offload(cache_gb="50%"),
        ]
    )
    assert "cache_gb=1e-06" in too_small["error"] or "cache_gb=1e-06" in too_small["trace"]
    assert "Minimum" in too_small["trace"]
    assert "store_dir" in no_directory["trace"]
    assert str(blocked) in no_directory["trace"]
    assert first["batches"] == second["batches"]
    (directory,) = stores.glob("*/rank0of1")
    assert sorted(path.name for path in directory.iterdir()) == ["experts.bin", "manifest.json"]
    for path in directory.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_cache_smaller_than_a_layer_serves_in_waves(demo_model, share_engines, store_dir):
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
    # Sums are split, so only the first generated token's logprobs are compared. In float32: how
    # far bfloat16 takes a split sum away depends on the machine's kernel.
    for mine, theirs in zip(waves["batches"][0], plain["batches"][0], strict=True):
        first, expected = mine["logprobs"][0], theirs["logprobs"][0]
        for token in first.keys() & expected.keys():
            assert float.fromhex(first[token]) == pytest.approx(
                float.fromhex(expected[token]), abs=1e-3
            )
        assert first.keys() & expected.keys()


def test_dummy_weights_are_stored_and_served(demo_model, share_engines, store_dir):
    model = demo_model("mixtral")
    plain, offloaded = share_engines(
        [
            engine(model, eager=True, load_format="dummy"),
            engine(
                model,
                eager=True,
                load_format="dummy",
                offload={"mode": "lru", "cache_gb": "50%", "store_dir": str(store_dir)},
            ),
        ]
    )
    assert offloaded["batches"] == plain["batches"]


def test_a_damaged_store_never_serves_wrong_tokens(
    demo_model, share_engines, run_engines, tmp_path
):
    model = demo_model("mixtral")
    kinds = {"built": {}, "flipped": {"verify": True}, "truncated": {}}
    jobs = [
        engine(
            model,
            eager=True,
            offload={"mode": "lru", "cache_gb": "50%", "store_dir": str(tmp_path / kind)}
            | more,
        )
        for kind, more in kinds.items()
    ]
    (built,) = share_engines(jobs[:1])
    assert "error" not in built
    for kind in ("flipped", "truncated"):
        shutil.copytree(tmp_path / "built", tmp_path / kind)
    (path,) = (tmp_path / "flipped").glob("*/rank0of1/experts.bin")
    flip_bytes(path)
    (path,) = (tmp_path / "truncated").glob("*/rank0of1/experts.bin")
    os.truncate(path, path.stat().st_size - 4096)
    flipped, truncated = run_engines(jobs[1:])
    assert "checksum" in flipped["trace"]
    assert "experts.bin" in flipped["trace"]
    assert "experts.bin" in truncated["trace"]


def flip_bytes(path: Path) -> None:
    """Flips one bit in the middle of every 4 KiB block."""
    data = bytearray(path.read_bytes())
    for offset in range(2048, len(data), 4096):
        data[offset] ^= 1
    path.write_bytes(data)


def test_get_metrics_over_two_engines_of_a_process(demo_model, run_engines, store_dir):
    def offload(share):
        options = {"mode": "lrfu", "cache_gb": share, "store_dir": str(store_dir)}
        model = demo_model("mixtral")
        return engine(model, eager=True, offload=options, disable_log_stats=False)

    first, second = run_engines([offload("50%"), offload("100%")])
    for name in ("hits", "misses", "read_bytes"):
        assert first["metrics"][name] == first["facts"][name]
        # Counters go on, as those of a worker that was restarted.
        assert second["metrics"][name] == first["facts"][name] + second["facts"][name]
    for run in (first, second):
        assert run["metrics"]["slots"] == run["facts"]["shape"][0]
        assert run["metrics"]["policy_info"] == 1
    assert second["metrics"]["resident_experts"] == EXPERTS * LAYERS
