"""``quantization_config``: what is served is understood, what is not is refused by its value."""

from __future__ import annotations

from typing import Any

import pytest

from tests.mutations import mutations
from vllm_moe_offload.plan.shapes import ExpertFormat
from vllm_moe_offload.plan.shapes.kernel_form import BF16
from vllm_moe_offload.plan.shapes.quantization import Quantization, quantization_of

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}


def compressed(storage: str, inputs: Any = None, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": storage,
        "config_groups": {"group_0": group},
    }


INT4_WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
INT4 = compressed("pack-quantized", symmetric=True, **INT4_WEIGHTS)
TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}
INT8 = compressed("int-quantized", TOKEN, num_bits=8, type="int", strategy="channel")


def parsed(entry: Any, **config: Any) -> Quantization:
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 4, **config}
    return quantization_of(config | {"quantization_config": entry}, "config.json")


@pytest.mark.parametrize(
    ("entry", "known"),
    [
        (None, BF16),
        ({}, BF16),
        (FP8, ExpertFormat("fp8")),
        (GPTQ, ExpertFormat("int4", "gptq", 128)),
        (GPTQ | {"dynamic": {r"-:.*\.gate$": {}}}, ExpertFormat("int4", "gptq", 128)),
        (AWQ, ExpertFormat("int4", "awq", 64, has_zero_points=True)),
        (INT4, ExpertFormat("int4", "compressed-tensors", 32)),
        (
            compressed("pack-quantized", symmetric=False, **INT4_WEIGHTS),
            ExpertFormat("int4", "compressed-tensors", 32, has_zero_points=True),
        ),
        (INT8, ExpertFormat("int8")),
    ],
)
def test_what_is_served_is_understood(entry, known):
    found = parsed(entry)
    assert found.experts == known
    assert not found.refusal


def test_mxfp4_is_gpt_oss_alone():
    entry = {"quant_method": "mxfp4"}
    assert parsed(entry, model_type="gpt_oss").experts == ExpertFormat("mxfp4")
    assert "'mxfp4' is served of gpt_oss models alone" in parsed(entry).refusal


NVFP4 = compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group")


def test_nvfp4_by_either_name():
    assert parsed(NVFP4).experts == ExpertFormat("nvfp4", "compressed-tensors")
    ours = ExpertFormat("nvfp4", "modelopt")
    assert parsed({"quant_method": "modelopt", "quant_algo": "nvfp4"}).experts == ours
    older = {"quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4"}}
    assert parsed(older).experts == ours


def test_the_name_that_mlx_gives_it():
    found = quantization_of({"quantization": {"bits": 4, "group_size": 64}}, "config.json")
    assert found.refusal.startswith("quantization_config: quant_method='unnamed', must be fp8")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"quant_method": "torchao"}, "quant_method='torchao', must be fp8 or compressed-"),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8"},
            "quant_algo='FP8', must be 'NVFP4' or 'W4A16_NVFP4'",
        ),
        ({"quant_method": "fp8"}, "weight_block_size=None, must be [128, 128]"),
        (
            FP8 | {"weight_block_size": [64, 64]},
            "weight_block_size=[64, 64], must be [128, 128]",
        ),
        (GPTQ | {"bits": 8}, "bits=8, must be 4"),
        (GPTQ | {"sym": False}, "sym=False, must be True"),
        (GPTQ | {"desc_act": True}, "desc_act=True, must be False"),
        (GPTQ | {"group_size": -1}, "group_size=-1, must be 32 or 64 or 128"),
        (
            GPTQ | {"dynamic": {"+:.*down_proj": {"bits": 8}}},
            "dynamic has '+:.*down_proj': {'bits': 8}, must only leave modules out",
        ),
        (AWQ | {"zero_point": False}, "zero_point=False, must be True"),
        (AWQ | {"bits": 8}, "bits=8, must be 4"),
        (compressed("float-quantized", num_bits=8, type="float"), "format='float-quantized'"),
        (
            compressed("pack-quantized", **(INT4_WEIGHTS | {"num_bits": 8})),
            "weights.num_bits=8, must be 4",
        ),
        (
            compressed("pack-quantized", actorder="group", **INT4_WEIGHTS),
            "weights.actorder='group', must be None or 'weight' or 'static'",
        ),
        (
            compressed("pack-quantized", **(INT4_WEIGHTS | {"strategy": "channel"})),
            "weights.strategy='channel', must be 'group'",
        ),
        (
            compressed(
                "int-quantized", TOKEN | {"dynamic": False}, num_bits=8, strategy="channel"
            ),
            "input_activations.dynamic=False, must be True",
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {}},
            "config_groups must have one group whose targets are experts or 'Linear'",
        ),
        (
            FP8 | {"modules_to_not_convert": ["model.layers.3.mlp.experts.5.up_proj"]},
            "'model.layers.3.mlp.experts.5.up_proj' is not quantised, must not name routed",
        ),
    ],
)
def test_what_is_not_served_names_the_value_and_what_is_allowed(entry, message):
    found = parsed(entry)
    assert found.experts is None
    assert found.refusal.startswith("quantization_config: ")
    assert message in found.refusal


def test_experts_may_have_a_group_of_their_own():
    entry = compressed("pack-quantized", **INT4_WEIGHTS)
    groups = entry["config_groups"]
    groups["attention"] = groups["group_0"] | {"targets": ["re:.*self_attn.*"]}
    assert parsed(entry).experts == ExpertFormat("int4", "compressed-tensors", 32)
    groups["experts"] = groups["group_0"] | {
        "targets": ["re:.*mlp.experts.*"],
        "weights": INT4_WEIGHTS | {"group_size": 64},
    }
    assert parsed(entry).experts == ExpertFormat("int4", "compressed-tensors", 64)


@pytest.mark.parametrize(
    "name",
    [
        "mlp.gate",
        "model.layers.0.mlp.shared_experts",
        "re:.*shared_experts.*",
        "model.layers.4.mlp.experts.0.up_proj",  # predicts further tokens
        "mtp.layers.0.mlp.experts",
    ],
)
def test_modules_beside_the_served_experts_may_stay_as_they_are(name):
    assert parsed(FP8 | {"modules_to_not_convert": [name]}).experts == ExpertFormat("fp8")


def test_dense_weights_are_what_their_modules_are():
    assert parsed(None).dense_bytes_of("attn") == 2
    assert parsed(FP8).dense_bytes_of("attn") == pytest.approx(1, abs=1e-3)
    assert parsed(GPTQ).dense_bytes_of("attn") == 0.5 + 2 / 128
    assert parsed(AWQ).dense_bytes_of("attn") == 0.5 + 2.5 / 64
    assert parsed(INT8).dense_bytes_of("attn") == 1
    assert parsed({"quant_method": "mxfp4"}, model_type="gpt_oss").dense_bytes_of("attn") == 2
    # Nothing is known of formats that are not served.
    assert parsed({"quant_method": "torchao"}).dense_bytes_of("attn") == 2
    assert parsed(NVFP4).dense_bytes_of("attn") == 0.5 + 1 / 16
    kept = INT4 | {"ignore": ["lm_head", "re:.*self_attn.*"]}
    assert parsed(kept).dense_bytes_of("attn") == 2
    assert parsed(kept).dense_bytes_of("shared_expert") < 1
    left_out = GPTQ | {"dynamic": {r"-:.*self_attn\.q_proj$": {}}}
    assert parsed(left_out).dense_bytes_of("attn") == 2


@pytest.mark.parametrize("entry", [FP8, GPTQ, AWQ, INT4, INT8, NVFP4])
def test_any_entry_is_understood_or_refused(entry):
    entry = entry | {"ignore": ["model.layers.1.mlp.experts"], "ignored_layers": ["lm_head"]}
    for changed in mutations(entry):
        refusal = parsed(changed).refusal
        assert refusal.isprintable()
        assert len(refusal) < 500


@pytest.mark.parametrize(
    "changes",
    [
        {"ignored_layers": 5},
        {"modules_to_not_convert": {"lm_head": 1}},
        {"ignore": ["model.layers." + "9" * 5000 + ".mlp.experts"]},
    ],
)
def test_lists_that_are_none_are_left_alone(changes):
    assert parsed(FP8 | changes).method == "fp8"


def test_targets_that_are_no_list_name_nothing():
    group = {"targets": 5, "weights": {}}
    entry = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    assert "must have one group whose targets" in parsed(entry).refusal
