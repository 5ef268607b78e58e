"""The options' reference: complete, and the page that is made of it is current."""

from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from scripts.write_options import PAGE, page
from vllm_moe_offload.config import OffloadConfig, options

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_is_current():
    assert PAGE.read_text() == page(), "run `make docs`"


def test_every_option_is_on_the_page():
    text = PAGE.read_text()
    for name in OffloadConfig.model_fields:
        assert f"## `{name}`\n" in text


@pytest.mark.parametrize("option", options(), ids=lambda option: option.name)
def test_every_option_says_its_default(option):
    assert option.description
    assert option.default not in {"", "none", "null"}
    assert f"default: {option.default})" in option.summary


def test_units_are_named_where_there_are_any():
    units = {option.name: option.unit for option in options()}
    assert units["cache_gb"] == units["record_trace_limit_gb"] == "GiB"
    assert units["io_threads"] == "threads"
    assert units["verify"] is None
    for option in options():
        if option.name.endswith("_gb"):
            assert "unit: GiB; default: " in option.summary


def test_defaults_that_are_no_constants_are_told_in_words():
    defaults = {option.name: option.default for option in options()}
    assert "~/.cache/vllm-moe-offload" in defaults["store_dir"]
    assert "activations.msgpack" in defaults["trace_path"]
    assert str(Path.home()) not in PAGE.read_text()


def test_an_option_that_declares_nothing_but_its_type_is_described_too():
    class More(OffloadConfig):
        tier_gb: Annotated[float | str, Field(description="Host memory.")] = "auto"
        spare_gb: Annotated[float | None, Field(gt=0, description="Spare.")] = None

    host, spare = list(options(More))[-2:]
    assert host.summary == "tier_gb: Host memory. (unit: GiB; default: auto)"
    assert spare.type == "number, above 0"
    assert spare.default == "none"


def test_a_type_without_words_is_an_error():
    class More(OffloadConfig):
        shape: Annotated[tuple[int, int], Field(description="A pair.")] = (1, 2)

    with pytest.raises(TypeError, match="shape"):
        list(options(More))
