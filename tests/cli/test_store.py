"""``store list|verify|remove`` as a user calls them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stores import build
from vllm_moe_offload import cli
from vllm_moe_offload.rank import Rank
from vllm_moe_offload.store import DamagedStore, open_store

NAME = "vllm_moe_offload.cli"
ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: object) -> int:
    return cli.main(["store", *map(str, arguments)])


def test_list_shows_every_store_and_the_sum(tmp_path: Path, capsys) -> None:
    one, two = build(tmp_path), build(tmp_path, vllm_version="0.33.0")
    assert run("list", "--store-dir", tmp_path) == 0
    text = capsys.readouterr().out
    for store in (one, two):
        assert store.directory.parent.name in text
        assert store.identity.vllm_version in text
    assert text.count("complete") == 2
    assert f"GiB in {tmp_path}" in text


def test_list_of_nothing(tmp_path: Path, capsys) -> None:
    assert run("list", "--store-dir", tmp_path / "none") == 0
    assert "There are no stores in" in capsys.readouterr().out


def test_what_a_manifest_says_is_no_markup(tmp_path: Path, capsys) -> None:
    store = build(tmp_path)
    manifest = store.directory / "manifest.json"
    manifest.write_text(manifest.read_text()[:-2] + ', "[/bold]": 1}')
    assert run("list", "--store-dir", tmp_path) == 0
    assert "[/bold]" in capsys.readouterr().out.replace("\n", "")


def test_names_that_are_no_text_are_shown(tmp_path: Path) -> None:
    """A terminal takes only what it can encode, as in a locale other than C."""
    store_dir = tmp_path / os.fsdecode(b"stores\xff")
    build(store_dir)
    for command in (["list"], ["remove", "model"]):
        done = subprocess.run(
            [sys.executable, "-m", NAME, "store", *command, "--store-dir", store_dir],
            env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert r"stores\udcff" in done.stdout


def test_verify_finds_flipped_bytes_and_names_the_experts(tmp_path: Path, capsys) -> None:
    store = build(tmp_path)
    assert run("verify", "--store-dir", tmp_path, "model") == 0
    assert "every record is intact" in capsys.readouterr().out
    with store.path.open("r+b") as file:
        for layer, expert in ((0, 2), (2, 1)):
            file.seek(store.record_offset(layer, expert) + 5)
            (byte,) = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))
    assert run("verify", "--store-dir", tmp_path, store.directory.parent.name) == 1
    text = capsys.readouterr().out
    assert "damaged" in text
    first, *experts, last = text.splitlines()
    assert first.endswith(": damaged")
    assert [line.split(" from ")[0].strip() for line in experts] == [
        "cannot read expert 2 of layer 0",
        "cannot read expert 1 of layer 2",
    ]
    assert "the next start of a server builds" in last
    with pytest.raises(DamagedStore):
        open_store(store.directory, store.identity)


def test_verify_of_a_store_that_does_not_open(tmp_path: Path, capsys) -> None:
    store = build(tmp_path)
    (store.directory / "manifest.json").write_text("{}")
    assert run("verify", "--store-dir", tmp_path, "model") == 1
    assert "is not a valid manifest" in capsys.readouterr().out


def test_remove_deletes_what_is_named(tmp_path: Path, capsys) -> None:
    one, two = build(tmp_path), build(tmp_path, checkpoint="beef")
    assert run("remove", "--store-dir", tmp_path, one.directory.parent.name) == 0
    assert f"removed {one.directory.parent}" in capsys.readouterr().out
    assert not one.directory.exists()
    assert two.directory.exists()


@pytest.mark.parametrize("command", ["verify", "remove"])
def test_a_store_that_is_not_there_is_one_line(tmp_path: Path, command: str, capsys) -> None:
    store = build(tmp_path)
    assert run(command, "--store-dir", tmp_path, "mixtral") == 2
    error = capsys.readouterr().err
    assert f"there is no store 'mixtral' in {tmp_path}; there are: " in error
    assert store.directory.parent.name in error
    assert error.count("\n") == 1
    assert store.path.exists()


def test_verify_of_a_store_that_lacks_a_rank(tmp_path: Path, capsys) -> None:
    build(tmp_path, rank=Rank(tp_size=2))
    assert run("verify", "--store-dir", tmp_path, "model") == 0
    printed = capsys.readouterr().out
    assert "every record is intact" in printed
    assert "1 of 2 parts are here: workers on other machines have theirs there" in printed
