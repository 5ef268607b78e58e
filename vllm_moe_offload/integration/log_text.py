"""Log lines that any stream can take, whatever the names of files are.

A name of bytes that are no UTF-8 is a string with surrogates to Python. Streams refuse those, and
logging shows a traceback in place of the line.
"""

from __future__ import annotations

import logging


def install() -> None:
    """For all of the plugin's lines in this process; safe to call again."""
    logging.getLogger("vllm.moe_offload").addFilter(_escape)


def _escape(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    text = message.encode(errors="backslashreplace").decode()
    if text != message:
        record.msg, record.args = text, None
    return True
