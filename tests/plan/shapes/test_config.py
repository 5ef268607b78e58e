"""config.json to shape: which layers have experts, and errors that name the field."""

from __future__ import annotations

import pytest

from tests.mutations import mutations
from tests.plan.shapes.test_quantization import FP8
from vllm_moe_offload.plan.shapes import ExpertFormat, ShapeError, known_models, shape_of_config


def config_of(name, **changes):
    return {**known_models()[name].config, **changes}


def test_dense_layers_of_deepseek():
    shape = shape_of_config(config_of("DeepSeek-V3"), "c")
    assert shape.moe_layers == tuple(range(3, 61))
    assert shape.extra_expert_layers == (61,)
    assert shape.format == ExpertFormat("fp8")
    every_second = shape_of_config(config_of("DeepSeek-V2-Lite", moe_layer_freq=2), "c")
    assert every_second.moe_layers == tuple(range(2, 27, 2))


def test_sparse_step_and_dense_layers_of_qwen():
    config = config_of("Qwen3-30B-A3B", decoder_sparse_step=2, mlp_only_layers=[1])
    assert shape_of_config(config, "c").moe_layers == tuple(range(3, 48, 2))


def test_fewer_moe_layers_mean_dense_mlps_in_their_place():
    whole = shape_of_config(config_of("Qwen3-30B-A3B"), "c")
    less = shape_of_config(config_of("Qwen3-30B-A3B", mlp_only_layers=[0]), "c")
    mlp, router = 3 * 2048 * 6144, 2048 * 128
    assert less.dense_parameters == whole.dense_parameters + mlp - router
    assert less.total_experts == whole.total_experts - 128


def test_tied_embeddings_count_once():
    untied = shape_of_config(config_of("OLMoE-1B-7B"), "c")
    tied = shape_of_config(config_of("OLMoE-1B-7B", tie_word_embeddings=True), "c")
    assert untied.dense_parameters - tied.dense_parameters == 50304 * 2048


def test_layer_types_are_taken_where_given():
    kinds = ["full_attention"] * 24
    shape = shape_of_config(config_of("gpt-oss-20b", layer_types=kinds), "c")
    assert shape.kv.bytes_per_token == 2 * 24 * 8 * 64 * 2
    assert shape.kv.bytes_per_request(1000) == 0


def test_a_model_that_sees_is_more_than_its_language_model():
    config = config_of("Qwen3.5-35B-A3B")
    whole = shape_of_config(config, "c")
    deeper = config["vision_config"] | {"depth": 28}
    more = shape_of_config(config | {"vision_config": deeper}, "c").dense_parameters
    block = 4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
    assert more == whole.dense_parameters + block
    for name, value in (("vision_config", None), ("text_config", "qwen")):
        with pytest.raises(ShapeError, match=f"c: {name}={value!r}, must be an object"):
            shape_of_config(config | {name: value}, "c")
    text = config["text_config"] | {"num_experts": 0}
    with pytest.raises(ShapeError, match="c: num_experts=0, must be an integer from 1"):
        shape_of_config(config | {"text_config": text}, "c")


@pytest.mark.parametrize("name", known_models())
def test_layers_and_ends_are_all_there_is(name):
    shape = shape_of_config(config_of(name), "c")
    ends = shape.ends
    assert len(shape.layers) == shape.num_layers
    in_layers = sum(layer.dense_bytes for layer in shape.layers)
    in_ends = ends.embedding_bytes + ends.head_bytes + ends.rest_bytes
    assert in_layers + in_ends == shape.dense_bytes
    assert ends.embedding_bytes == shape.lookup_bytes or not ends.head_bytes
    assert 0 < ends.rest_bytes < shape.dense_bytes / 5
    for layer in shape.layers:
        assert 0 < layer.whole_bytes < layer.dense_bytes


def test_layers_of_several_kinds_are_told_apart():
    deepseek = shape_of_config(config_of("DeepSeek-V3"), "c").layers
    assert deepseek[2].dense_bytes > deepseek[3].dense_bytes  # an MLP for one shared expert
    assert len(set(deepseek)) == 2
    assert {layer.kv_heads for layer in deepseek} == {0}
    sliding, full = shape_of_config(config_of("gpt-oss-20b"), "c").layers[:2]
    assert (sliding.kv.per_token, full.kv.window_per_token) == (0, 0)
    assert sliding.kv.window_per_token == full.kv.per_token == 2 * 8 * 64
    qwen = shape_of_config(config_of("Qwen3-Next-80B-A3B"), "c").layers
    assert [bool(layer.kv.state_per_request) for layer in qwen[:4]] == [True] * 3 + [False]


def test_other_names_of_the_same_fields():
    config = config_of("Qwen3-30B-A3B")
    config["num_local_experts"] = config.pop("num_experts")
    config["experts_per_token"] = config.pop("num_experts_per_tok")
    assert shape_of_config(config, "c") == shape_of_config(config_of("Qwen3-30B-A3B"), "c")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama' is not known; known are mixtral"),
        ({"model_type": None}, "model_type=None is not known"),
        ({"hidden_size": None}, "hidden_size is missing"),
        (
            {"hidden_size": "4096"},
            "hidden_size='4096', must be an integer from 1 to 2147483647",
        ),
        ({"num_hidden_layers": 50_000_000}, "num_hidden_layers=50000000, must be an integer"),
        ({"hidden_size": 10**18}, "hidden_size=1000000000000000000, must be an integer from 1"),
        ({"hidden_size": True}, "hidden_size=True, must be an integer from 1"),
        (
            {"num_local_experts": 1 << 20},
            "num_local_experts=1048576, must be an integer from 1",
        ),
        (
            {"num_experts_per_tok": 65},
            "num_experts_per_tok=65, must be an integer from 1 to 64",
        ),
        ({"num_nextn_predict_layers": 10**9}, "num_nextn_predict_layers=1000000000, must be"),
        ({"hidden_size": [0] * 10**6}, "hidden_size=[0, 0, 0, 0, 0, 0, ...], must be"),
        ({"model_type": ["mixtral"]}, "model_type=['mixtral'] is not known"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0, must be an integer from 1 to 4096"),
        ({"num_local_experts": None}, "num_local_experts or num_experts or n_routed_experts"),
        ({"num_experts_per_tok": 9}, "9 experts per token, but a layer has 8"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no', must be true or false"),
        ({"quantization_config": "fp8"}, "quantization_config='fp8', must be an object"),
        ({"model_type": "qwen3_5_moe"}, "linear_num_key_heads is missing"),
    ],
)
def test_wrong_fields_are_named(changes, message):
    with pytest.raises(ShapeError) as caught:
        shape_of_config(config_of("Mixtral-8x7B", **changes), "some/config.json")
    assert str(caught.value).startswith("some/config.json: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("name", known_models())
def test_any_config_has_a_shape_or_an_error_of_one_line(name):
    quantised = {"quantization_config": FP8} if name == "DeepSeek-V3" else {}
    for config in mutations(config_of(name, **quantised)):
        try:
            shape = shape_of_config(config, "some/config.json")
        except ShapeError as error:
            line = str(error)
        else:
            assert shape.total_experts > 0
            assert shape.dense_bytes > 0
            continue
        assert line.startswith("some/config.json: ")
        assert line.isprintable()
        assert len(line) < 500


def test_a_model_without_a_single_moe_layer_is_refused():
    config = config_of("DeepSeek-V2-Lite", first_k_dense_replace=27)
    with pytest.raises(ShapeError, match="nothing to offload"):
        shape_of_config(config, "c")
    with pytest.raises(ShapeError, match="layer_types must be a list of num_hidden_layers=24"):
        shape_of_config(config_of("gpt-oss-20b", layer_types=["full_attention"]), "c")
    with pytest.raises(ShapeError, match="must be a list of integers"):
        shape_of_config(config_of("Qwen3-30B-A3B", mlp_only_layers="0"), "c")
