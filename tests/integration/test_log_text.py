"""Lines of the log with names of files that are no UTF-8."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import ENGINES, ROOT
from vllm_moe_offload.integration import log_text


@pytest.fixture
def lines():
    """What a handler writes to a stream that takes UTF-8 alone, as most terminals' do."""
    logger = logging.getLogger("vllm.moe_offload")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    log_text.install()

    def read() -> list[str]:
        stream.seek(0)
        return stream.read().splitlines()

    yield logger, read
    logger.removeHandler(handler)


def test_names_that_are_no_text_are_shown(lines):
    logger, read = lines
    logger.warning("building %s, %d%%", Path(os.fsdecode(b"/stores\xff")), 7)
    logger.warning("building %s, %d%%", "/caf\u00e9", 8)
    assert read() == [r"building /stores\udcff, 7%", "building /caf\u00e9, 8%"]


PROCESS = """
import logging, os, sys
import vllm_moe_offload
logging.basicConfig(stream=sys.stdout)
vllm_moe_offload.register()
logging.getLogger("vllm.moe_offload").warning("building %s", os.fsdecode(b"/stores\\xff"))
"""


def test_every_process_has_it():
    done = subprocess.run(
        [sys.executable, "-c", PROCESS],
        env={**ENGINES, "PYTHONIOENCODING": "utf-8:strict"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert r"building /stores\udcff" in done.stdout
    assert "Logging error" not in done.stderr
