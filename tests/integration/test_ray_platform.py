"""The CPU platform for Ray, and what a node tells of itself; without Ray."""

import importlib.metadata

import pytest
from vllm import platforms

from vllm_moe_offload import __version__
from vllm_moe_offload.integration import node_facts, ray_nodes, ray_platform

WITH_AMX = "model name\t: CPU\nflags\t\t: fpu avx2 avx512f amx_tile\n"


@pytest.mark.parametrize("value", [None, "", "0"])
def test_nobody_asks_for_the_platform(monkeypatch, value):
    monkeypatch.delenv(ray_platform.ENVIRONMENT, raising=False)
    if value is not None:
        monkeypatch.setenv(ray_platform.ENVIRONMENT, value)
    assert ray_platform.ray_cpu_platform() is None


def test_the_platform_that_is_asked_for_is_vllms_for_cpus_with_a_key_for_ray(monkeypatch):
    monkeypatch.setenv(ray_platform.ENVIRONMENT, "1")
    name = ray_platform.ray_cpu_platform()
    found = platforms.resolve_obj_by_qualname(name)()
    assert found.is_cpu()
    assert isinstance(found, platforms.resolve_obj_by_qualname(platforms.cpu_platform_plugin()))
    assert found.ray_device_key == "GPU"
    assert platforms.current_platform.ray_device_key == ""


def test_a_vllm_for_gpus_keeps_its_platform(monkeypatch):
    monkeypatch.setenv(ray_platform.ENVIRONMENT, "1")
    monkeypatch.setattr(platforms, "cpu_platform_plugin", lambda: None)
    assert ray_platform.ray_cpu_platform() is None


def test_the_entry_point_is_named_as_the_plugin():
    """One name in VLLM_PLUGINS is enough for both."""
    (found,) = importlib.metadata.entry_points(
        group="vllm.platform_plugins", name=node_facts.PLUGIN
    )
    assert found.load() is ray_platform.ray_cpu_platform


@pytest.fixture
def cpu(monkeypatch, tmp_path):
    """A machine with AMX."""
    path = tmp_path / "cpuinfo"
    path.write_text(WITH_AMX)
    monkeypatch.setattr(node_facts, "CPUINFO", str(path))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.delenv("VLLM_TARGET_DEVICE", raising=False)
    monkeypatch.setenv(ray_platform.ENVIRONMENT, "1")
    return path


def test_what_a_node_tells(cpu):
    facts = node_facts.facts(None)
    assert facts["vllm-moe-offload"] == __version__
    assert facts["plugin"] == "installed"
    assert facts["instruction set"].endswith(" avx2 avx512f amx_tile")
    assert facts["platform for Ray"] == "asked for"
    assert facts["vLLM"] == importlib.metadata.version("vllm")


@pytest.mark.parametrize(
    ("variable", "told"),
    [
        ("VLLM_PLUGINS=", "plugin: switched off by VLLM_PLUGINS='', here: installed"),
        ("VLLM_PLUGINS=other", "plugin: switched off by VLLM_PLUGINS='other', here: installed"),
        (
            "VLLM_TARGET_DEVICE=cpu",
            "platform for Ray: bypassed by VLLM_TARGET_DEVICE='cpu', here: asked for",
        ),
        (
            f"{ray_platform.ENVIRONMENT}=0",
            f"platform for Ray: not asked for by {ray_platform.ENVIRONMENT}=1, here: asked for",
        ),
    ],
)
def test_variables_of_a_node_that_differ(cpu, monkeypatch, variable, told):
    driver = node_facts.facts(None)
    name, _, value = variable.partition("=")
    monkeypatch.setenv(name, value)
    node = node_facts.facts(None)
    assert list(ray_nodes.differences(driver, node, on_cpus=True)) == [told]


def test_what_a_driver_allows_holds_where_a_node_says_nothing(cpu, monkeypatch):
    assert node_facts.facts("other")["plugin"] == "switched off by VLLM_PLUGINS='other'"
    monkeypatch.setenv("VLLM_PLUGINS", "other,moe_offload")
    assert node_facts.facts("other")["plugin"] == "installed"


def test_another_cpu_matters_on_cpus(cpu):
    driver = node_facts.facts(None)
    cpu.write_text(WITH_AMX.replace(" amx_tile", ""))
    node = node_facts.facts(None)
    (told,) = ray_nodes.differences(driver, node, on_cpus=True)
    assert told.startswith("instruction set: ")
    assert list(ray_nodes.differences(driver, node, on_cpus=False)) == []


def test_a_node_without_the_packages(cpu, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    def no_module(name):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(node_facts, "version", missing)
    monkeypatch.setattr(node_facts.importlib, "import_module", no_module)
    monkeypatch.setattr(node_facts, "entry_points", lambda **_: ())
    facts = node_facts.facts(None)
    assert [facts[name] for name in ray_nodes.SAME] == ["missing"] * 3
