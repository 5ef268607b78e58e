"""Options: what is accepted, and that refusals name option, value and what is allowed."""

import pytest

from vllm_moe_offload.config import (
    GIB,
    MODES,
    OffloadConfig,
    OptionError,
    parse_cache_size,
    parse_options,
)


def test_defaults_are_off():
    assert not parse_options({}).enabled


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_accepted(mode):
    assert parse_options({"mode": mode}).enabled == (mode != "off")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (8, ("bytes", 8 * GIB)),
        (0.5, ("bytes", GIB / 2)),
        ("8", ("bytes", 8 * GIB)),
        ("25%", ("share", 0.25)),
        ("100%", ("share", 1.0)),
        ("auto", ("auto", 0.0)),
    ],
)
def test_cache_size_is_parsed(value, expected):
    assert parse_cache_size(value) == expected


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"mode": "fifo"}, ["mode", "'fifo'", "lrfu"]),
        ({"cache_gb": 0}, ["cache_gb", "0", '"25%"']),
        ({"cache_gb": "-3"}, ["cache_gb", "-3", '"auto"']),
        ({"cache_gb": "150%"}, ["cache_gb", "150%", "(0%, 100%]"]),
        ({"cache_gb": "lots"}, ["cache_gb", "lots", '"auto"']),
        ({"cache_gb": float("nan")}, ["cache_gb", "nan"]),
        ({"host_gb": 0}, ["host_gb", "0", '"25%"']),
        ({"host_gb": "much"}, ["host_gb", "much", '"auto"']),
        ({"io_threads": 0}, ["io_threads", "0", "greater than or equal to 1"]),
        ({"record_trace": "trace.txt"}, ["record_trace", "trace.txt", ".npz"]),
        ({"trace_path": "eam.npz"}, ["trace_path", "eam.npz", ".msgpack"]),
        ({"trace_path": "nothing"}, ["trace_path", "nothing", '"none"']),
        ({"record_trace_limit_gb": float("inf")}, ["record_trace_limit_gb", "inf", "1048576"]),
        ({"record_trace_limit_gb": "1e300"}, ["record_trace_limit_gb", "1e300", "1048576"]),
        ({"record_trace_limit_gb": float("nan")}, ["record_trace_limit_gb", "nan"]),
        ({"record_trace_limit_gb": -1}, ["record_trace_limit_gb", "-1", "greater than 0"]),
        ({"verify": "perhaps"}, ["verify", "perhaps"]),
        ({"cachegb": 8}, ["cachegb", "cache_gb", "store_dir"]),
    ],
)
def test_refusal_names_option_value_and_what_is_allowed(options, fragments):
    with pytest.raises(OptionError) as caught:
        parse_options({"mode": "trace", **options})
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_every_problem_is_reported_at_once():
    with pytest.raises(OptionError) as caught:
        parse_options({"mode": "fifo", "cache_gb": 0, "typo": 1})
    assert len(str(caught.value).splitlines()) == 3


def test_options_must_be_a_mapping():
    with pytest.raises(OptionError, match="mapping"):
        parse_options("trace")  # type: ignore[arg-type]


def test_every_option_is_documented():
    for name, field in OffloadConfig.model_fields.items():
        assert field.description, name


def test_store_dir_follows_the_cache_directory(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert OffloadConfig().store_dir == "/somewhere/vllm-moe-offload"
