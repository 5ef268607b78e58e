"""How many examples Hypothesis tries where a hundred take seconds."""

from __future__ import annotations

import os

THOROUGH = os.environ.get("VMO_THOROUGH_TESTS") == "1"
"""Set by `make test-all` and `make sanitize`."""


def examples(thorough: int) -> int:
    """``thorough`` of them where there is time, else a third."""
    return thorough if THOROUGH else max(thorough // 3, 1)
