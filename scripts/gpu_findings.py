"""What a step of the GPU sequence found, as soon as it did: lines of JSON that its parent reads.

A step may be killed at its limit, so a finding is on disk before the next one is sought.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

VARIABLE = "VMO_FINDINGS"
"""Environment variable with the file that findings are appended to."""


def note(name: str, **finding: Any) -> None:
    """Appends one finding and prints it; without the variable it is printed only.

    Args:
        name: what was sought, such as ``memory``.
        finding: plain data.
    """
    line = json.dumps({"name": name, **finding})
    print(line, flush=True)
    path = os.environ.get(VARIABLE)
    if path:
        with Path(path).open("a") as file:
            file.write(line + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """All whole findings in a file; none if it does not exist yet."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
