"""Command line and additional_config: parsed, carried, refused where it cannot work."""

import argparse
import json
import shlex

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.integration.conftest import ARCHS
from vllm_moe_offload import cli
from vllm_moe_offload.config import MODES, OffloadConfig, OptionError, options, parse_cache_size
from vllm_moe_offload.integration import plugin


@pytest.fixture(scope="module", autouse=True)
def registered():
    plugin.register()


@pytest.fixture
def parser():
    return EngineArgs.add_cli_args(FlexibleArgumentParser())


def parse(parser, *arguments):
    return EngineArgs.from_cli_args(parser.parse_args(list(arguments)))


def test_mode_alone(parser):
    args = parse(parser, "--moe-offload=trace")
    assert args.additional_config["moe_offload"] == {"mode": "trace"}


def test_json_and_dotted_options(parser):
    args = parse(
        parser, "--moe-offload=lru", "--moe-offload-config", '{"cache_gb": 2, "verify": true}'
    )
    assert args.additional_config["moe_offload"] == {
        "mode": "lru",
        "cache_gb": 2,
        "verify": True,
    }
    args = parse(parser, "--moe-offload=lru", "--moe-offload-config.cache_gb", "25%")
    assert args.additional_config["moe_offload"] == {"mode": "lru", "cache_gb": "25%"}


def test_other_additional_config_stays(parser):
    args = parse(parser, "--moe-offload=lru", "--additional-config", '{"other": 1}')
    assert args.additional_config == {"other": 1, "moe_offload": {"mode": "lru"}}


def test_nothing_given_leaves_nothing(parser):
    assert "moe_offload" not in parse(parser).additional_config


def test_options_without_a_mode_are_refused(parser):
    with pytest.raises(OptionError, match="--moe-offload=MODE"):
        parse(parser, "--moe-offload-config", '{"cache_gb": 2}')


def test_wrong_mode_names_the_modes(parser, capsys):
    with pytest.raises(SystemExit):
        parse(parser, "--moe-offload=fifo")
    message = capsys.readouterr().err
    assert all(mode in message for mode in MODES)


def test_help_lists_every_option(parser):
    assert "MoE offload" in parser.format_help()  # vLLM's short help lists groups
    (action,) = (a for a in parser._actions if "--moe-offload-config" in a.option_strings)
    for name in OffloadConfig.model_fields:
        assert name == "mode" or f"{name}:" in action.help


EXPERT_PARALLEL = {"tensor_parallel_size": 2, "enable_expert_parallel": True}


def configure(model, **overrides):
    options = {"mode": "trace", "cache_gb": "50%", **overrides.pop("offload", {})}
    args = EngineArgs(
        model=str(model),
        max_model_len=128,
        additional_config={"moe_offload": options},
        **overrides,
    )
    return args.create_engine_config()


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (
            {"pipeline_parallel_size": 2, "enforce_eager": True},
            ["pipeline_parallel_size=2", "enforce_eager=True", "leave enforce_eager out"],
        ),
        ({"data_parallel_size": 2}, ["data_parallel_size=2", "allowed: 1"]),
        ({"enable_lora": True}, ["enable_lora=True"]),
        ({"cpu_offload_gb": 1.0}, ["cpu_offload_gb=1.0"]),
        ({"load_format": "sharded_state"}, ["load_format='sharded_state'", "safetensors"]),
        (
            {"speculative_config": {"method": "ngram_gpu", "num_speculative_tokens": 2}},
            ["speculative_config.method='ngram_gpu'", "allowed: ngram, suffix"],
        ),
        ({"offload": {"cache_gb": "0%"}}, ["cache_gb='0%'", "(0%, 100%]"]),
        ({"offload": {"host_gb": 4}}, ["host_gb=4", "cache_gb"]),
        ({"offload": {"cachegb": 1}}, ["cachegb", "cache_gb"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused_by_name(demo_model, overrides, fragments):
    with pytest.raises(OptionError) as caught:
        configure(demo_model("mixtral"), **overrides)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_parallel_size": 2},
        EXPERT_PARALLEL,
        {"pipeline_parallel_size": 2},
        {"pipeline_parallel_size": 2, **EXPERT_PARALLEL},
    ],
    ids=str,
)
def test_every_layout_without_data_parallel_is_let_pass(demo_model, layout):
    configure(demo_model("mixtral"), **layout)


def test_all_problems_are_listed_together(demo_model):
    with pytest.raises(OptionError) as caught:
        configure(demo_model("mixtral"), enable_lora=True, cpu_offload_gb=1.0)
    assert "enable_lora" in str(caught.value)
    assert "cpu_offload_gb" in str(caught.value)


def plan(capsys, model, host_memory, *options):
    assert (
        cli.main(["plan", str(model), f"--host-memory={host_memory}", "--json=-", *options])
        == 0
    )
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("everything", [True, False])
def test_the_line_that_plan_prints_is_accepted(parser, demo_model, capsys, arch, everything):
    model = demo_model(arch)
    document = plan(capsys, model, "8GiB")
    if not everything:
        kv_bytes = 256 * document["model"]["kv_bytes_per_token"]
        kv_bytes += document["model"]["kv_bytes_per_request"]
        fixed = document["model"]["dense_bytes"] + document["machine"]["runtime_bytes"]
        half = document["store_bytes"] // 2
        least = max(fixed + kv_bytes + half, document["build_bytes"])
        document = plan(capsys, model, f"{int(least / 0.92) + 2}B", "--kv-tokens=128")
    fitted = document["fit"]
    assert fitted["holds_everything"] is everything
    program, command, path, *options = shlex.split(document["commands"][0])
    assert (program, command, path) == ("vllm", "serve", str(model))
    config = parse(parser, "--model", path, *options).create_engine_config()
    offload = config.additional_config["moe_offload"]
    assert offload["mode"] == "trace"
    assert parse_cache_size(offload["cache_gb"]) == parse_cache_size(fitted["cache_gb"])
    assert config.cache_config.kv_cache_memory_bytes == fitted["kv_bytes"]
    assert "--max-model-len" in options or everything


def test_a_dense_model_is_refused(tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=64,
        dtype="bfloat16",
    ).save_pretrained(tmp_path)
    with pytest.raises(OptionError, match="dense"):
        configure(tmp_path, skip_tokenizer_init=True)


def test_off_is_never_refused(demo_model):
    configure(demo_model("mixtral"), enable_lora=True, offload={"mode": "off"})


def test_accepted_options_reach_the_engine(demo_model):
    config = configure(demo_model("mixtral"))
    assert config.additional_config["moe_offload"]["cache_gb"] == "50%"


def test_help_names_unit_and_default_of_every_option(parser):
    # vLLM's own format_help lists groups only.
    text = argparse.ArgumentParser.format_help(parser)
    text = " ".join(text.split()).replace("- ", "-")
    for option in options():
        if option.name == "mode":
            assert "--moe-offload MODE" in text
            assert "off leaves vLLM untouched. (default: off)" in text
            continue
        assert f"default: {option.default})".replace("- ", "-") in text, option.name
        if option.unit:
            assert f"(unit: {option.unit}; default: {option.default})" in text, option.name
    assert "trace. (default: off) (default: None)" not in text
