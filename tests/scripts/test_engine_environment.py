"""Engines need no network, and write where they are told to."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.engine_environment import (
    CACHES,
    LOOPBACK,
    NO_COMPILER,
    OFFLINE,
    compiler_environment,
    engine_environment,
)


def test_an_engine_talks_to_itself_and_to_nobody_else() -> None:
    found = engine_environment({"PATH": "/bin"})
    assert found == {"PATH": "/bin"} | OFFLINE | LOOPBACK | NO_COMPILER
    assert found["VLLM_HOST_IP"] == "127.0.0.1"
    assert found["GLOO_SOCKET_IFNAME"] == found["NCCL_SOCKET_IFNAME"] == "lo"


@pytest.mark.parametrize("name", [*LOOPBACK, *NO_COMPILER, *CACHES])
def test_what_the_user_set_stays(name: str, tmp_path: Path) -> None:
    assert engine_environment({name: "mine"}, tmp_path)[name] == "mine"


def test_engines_of_tests_are_offline_and_find_the_plugin() -> None:
    from tests.integration.conftest import ENGINES

    assert ENGINES["HF_HUB_OFFLINE"] == "1"
    assert set(LOOPBACK) <= set(ENGINES)
    assert Path(ENGINES["PYTHONPATH"].split(":")[0]) == Path(__file__).resolve().parents[2]


def test_only_without_inductor_nothing_is_compiled_ahead_of_time() -> None:
    assert compiler_environment("eager") == {"VLLM_USE_AOT_COMPILE": "0"}
    assert compiler_environment("inductor") == compiler_environment(None) == {}


def test_nothing_goes_online_whatever_was_set() -> None:
    assert engine_environment({"HF_HUB_OFFLINE": "0"})["HF_HUB_OFFLINE"] == "1"


def test_caches_are_kept_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = engine_environment({}, Path("work"))
    folders = [found[name] for name in CACHES]
    assert len(set(folders)) == len(folders)
    assert all(Path(folder).parent == tmp_path / "work" for folder in folders)
