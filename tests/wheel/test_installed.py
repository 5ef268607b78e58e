"""Our wheel beside vLLM's: what it holds, and what of it works where there is no GPU."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import vllm_moe_offload
from tests.device.kernels.harness import LAYOUT
from tests.device.kernels.targets import Compiled, resources
from vllm_moe_offload.device import cache, kernels
from vllm_moe_offload.device.tokens import LayerTokens

WHEEL = Path(os.environ["VMO_WHEEL"])


def test_environment_is_that_of_a_user() -> None:
    import vllm

    assert Path(vllm_moe_offload.__file__).is_relative_to(sys.prefix)
    assert vllm.__version__ == version("vllm")
    assert list(Path(vllm.__file__).parent.glob("_C*.so")), "vLLM's kernels for CUDA"


def test_vllm_finds_the_plugin_and_takes_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.platforms
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms.cpu import CpuPlatform
    from vllm.plugins import load_plugins_by_group
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    plugins = load_plugins_by_group("vllm.general_plugins")
    assert plugins["moe_offload"] is vllm_moe_offload.register
    plugins["moe_offload"]()
    # vLLM finds no device here, and has no options without one.
    monkeypatch.setattr(vllm.platforms, "_current_platform", CpuPlatform())
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parsed = parser.parse_args(["--moe-offload", "trace"])
    assert parsed.moe_offload == "trace"
    assert "--moe-offload-config" in parser.format_help()


def names_of_vllm() -> list[tuple[str, str]]:
    """Module and name of all that the package imports from vLLM, and variables that it reads."""
    found = set()
    for path in Path(vllm_moe_offload.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                found |= {(str(node.module), alias.name) for alias in node.names}
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "envs":
                found.add(("vllm.envs", node.attr))
    return sorted(found)


def test_names_that_are_imported_are_there() -> None:
    """Many are imported where they are used: one that is gone would show while serving."""
    names = names_of_vllm()
    assert len(names) > 50
    assert not [f"{module}.{name}" for module, name in names if not is_there(module, name)]


def is_there(module: str, name: str) -> bool:
    """Raises ImportError where the module itself is not."""
    if hasattr(importlib.import_module(module), name):
        return True
    try:
        return importlib.util.find_spec(f"{module}.{name}") is not None
    except ModuleNotFoundError:  # the module is no package
        return False


def test_what_is_patched_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installing a patch fails where vLLM has lost the place."""
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    from vllm_moe_offload.integration import draft_passes, patches, remote_counters, verified

    monkeypatch.setattr(vllm.platforms, "_current_platform", CpuPlatform())
    patches.install_model_patches()
    patches.install_cuda_patches()
    patches.install_runner_patches()
    draft_passes.install()
    verified.install()
    remote_counters.install_in_worker()


@pytest.mark.parametrize("num_slots", [100, 1536], ids=["waves", "at once"])
def test_kernels_compile(num_slots: int, tmp_path: Path) -> None:
    num_experts, top_k = 128, 8
    made = cache.DeviceCache(
        num_layers=4,
        num_experts=num_experts,
        num_slots=num_slots,
        top_k=top_k,
        max_tokens=2 * num_experts,
        device=torch.device("cpu"),
    )
    slots = {spec.name: torch.zeros(1, dtype=torch.uint8) for spec in LAYOUT.tensors}
    made.attach(LAYOUT, slots, torch.zeros(1, LAYOUT.record_bytes, dtype=torch.uint8))
    with Compiled(90, kernels) as compiled:
        for num_tokens in (1, 2 * num_experts):
            tokens = LayerTokens(
                torch.zeros(num_tokens, top_k, dtype=torch.int32),
                torch.zeros(num_tokens, dtype=torch.bool),
                torch.zeros(num_tokens, dtype=torch.int32),
            )
            if num_slots < num_experts:
                list(made.waves(0, tokens))
            else:
                made.bring(0, tokens)
        spilled = {name: resources(it, tmp_path)[1] for name, it in compiled.variants()}
    assert spilled == {"count": 0, "gather": 0, "plan": 0}


def test_wheel_holds_the_package_and_nothing_else() -> None:
    with zipfile.ZipFile(WHEEL) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    others = [name for name in names if not name.startswith("vllm_moe_offload/")]
    assert not others
    assert [name for name in names if name.endswith(".so")] == ["vllm_moe_offload/_core.so"]
    kinds = {Path(name).suffix for name in names} | {Path(name).name for name in names}
    assert kinds >= {".py", "py.typed", "known.json"}
    assert not [name for name in names if Path(name).suffix in {".cpp", ".h", ".cu"}]


def test_uninstalled_nothing_is_left(tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)

    python = environment / "bin" / "python"

    def run(*command: str | Path) -> None:
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": ""})

    def pip(*arguments: str | Path) -> None:
        run(sys.executable, "-m", "pip", "--quiet", "--python", python, *arguments)

    before = set(environment.rglob("*"))
    pip("install", "--no-deps", "--no-index", WHEEL)
    assert environment / "bin" / "vllm-moe-offload" in environment.rglob("*")
    run(python, "-c", "import vllm_moe_offload")
    pip("uninstall", "--yes", "vllm-moe-offload")
    assert set(environment.rglob("*")) == before
