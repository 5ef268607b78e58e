"""Experts never exist on the device as a whole: vLLM builds and loads with its device as torch's
default. The meta device stands in for it."""

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.model_loader.utils import device_loading_context

from vllm_moe_offload.config import OptionError
from vllm_moe_offload.integration import expert_tensors, loading, worker_load
from vllm_moe_offload.integration.experts import OffloadedExperts

DEVICE = torch.device("meta")


class Dense(torch.nn.Module):
    """Any layer of vLLM's."""

    def __init__(self, *, size):
        super().__init__()
        self.w13_weight = torch.nn.Parameter(torch.empty(size, 4), requires_grad=False)
        self.w13_bias = torch.nn.Parameter(torch.zeros(size), requires_grad=False)


class Experts(OffloadedExperts, Dense):
    """An expert layer of ours."""

    layer_name = "model.layers.0.mlp.experts"
    local_num_experts = 3
    expert_map = None


def test_expert_parameters_are_built_in_ram():
    with DEVICE:
        dense, experts = Dense(size=3), Experts(size=3)
        assert torch.empty(1).device == DEVICE  # the default is as it was
    assert {p.device for p in dense.parameters()} == {DEVICE}
    assert {p.device.type for p in experts.parameters()} == {"cpu"}


def test_runtime_is_made_in_ram_whatever_the_default(monkeypatch):
    made = {}

    def start_runtime(*_, **__):
        made["runtime"] = torch.zeros(1).device.type

    monkeypatch.setattr(worker_load, "start_runtime", start_runtime)
    monkeypatch.setattr(
        loading, "routers_of", lambda *_: made.update(routers=torch.zeros(1).device.type)
    )
    load = object.__new__(loading.ExpertLoad)
    layer = SimpleNamespace(quant_method=SimpleNamespace())
    known = SimpleNamespace(rebuild=lambda method, layer: made.update(rebuilt=True))
    monkeypatch.setattr(loading, "take_stored_form", lambda *_: None)
    load.layers, load._formats, load._model = [layer], [known], None
    load._store = SimpleNamespace(layout=None)
    load._vllm_config, load.options = SimpleNamespace(speculative_config=None), None
    load._is_drafter = False
    with DEVICE:
        load.finish()
    assert made == {"runtime": "cpu", "routers": "cpu", "rebuilt": True}
    assert layer.quant_method.process_weights_after_loading is loading._already_processed


def test_kernel_form_must_be_in_ram():
    layer = Experts(size=3)
    layer.quant_method = SimpleNamespace()
    expert_tensors.check_on_host(layer, expert_tensors.expert_tensors(layer))
    layer.w13_weight = torch.nn.Parameter(torch.empty(3, 4, device=DEVICE))
    with pytest.raises(OptionError) as caught:
        expert_tensors.check_on_host(layer, expert_tensors.expert_tensors(layer))
    assert "w13_weight" in str(caught.value)
    assert "meta" in str(caught.value)


def test_vllms_own_pass_leaves_rows_of_the_pool_alone():
    """It moves what it finds in RAM to the device and back; the pool is there already."""
    layer = Experts(size=3)
    for name in ("w13_weight", "w13_bias"):
        setattr(layer, name, torch.nn.Parameter(torch.empty(7, 4, device=DEVICE)))
    before = dict(layer.named_parameters())
    with device_loading_context(layer, DEVICE):
        loading._already_processed(layer)
    assert all(parameter is before[name] for name, parameter in layer.named_parameters())
    assert {parameter.device for parameter in layer.parameters()} == {DEVICE}
    assert {parameter.shape for parameter in layer.parameters()} == {torch.Size((7, 4))}


def test_dummy_experts_are_drawn_where_plain_vllm_draws_them(monkeypatch):
    drawn_on = []

    def draw(tensor):
        drawn_on.append(tensor.device)

    monkeypatch.setattr(loading, "initialize_single_dummy_weight", draw)
    loading._initialize_dummy(torch.empty(3))
    monkeypatch.setattr(loading, "current_platform", SimpleNamespace(device_type="meta"))
    with pytest.raises(NotImplementedError, match="meta"):  # has no values to bring to RAM
        loading._initialize_dummy(torch.empty(3))
    assert drawn_on == [torch.device("cpu"), DEVICE]


@pytest.mark.parametrize("stages", [1, 2])
def test_a_stage_may_be_without_experts_and_a_model_not(stages, caplog):
    config = SimpleNamespace(
        additional_config={"moe_offload": {"mode": "trace"}},
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
        speculative_config=None,
        lora_config=None,
    )
    if stages == 1:
        with pytest.raises(OptionError, match="Dense was built without a single routed expert"):
            loading._begin(config, None, Dense(size=1))
        return
    assert loading._begin(config, None, Dense(size=1)) is None
    assert "this pipeline stage has no routed experts" in caplog.text


def test_two_kinds_of_experts_in_a_layer_are_refused_by_name():
    """As ERNIE-VL has them, for text and for images: the store numbers experts by layer."""
    load = object.__new__(loading.ExpertLoad)
    load.layers = [
        SimpleNamespace(layer_name=f"model.layers.1.mlp.{kind}_experts")
        for kind in ("text", "vision")
    ]
    with pytest.raises(OptionError, match=r"text_experts.*vision_experts.*is not supported"):
        load.check_layers(SimpleNamespace(expert_layers=[1]))
