"""Says whether this machine can run the GPU suite, and names what is missing.

    python scripts/gpu_check.py

Prints device and versions. Exit status 1 if something is missing.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.gpu_probe import MODULES  # noqa: E402

LEAST_CAPABILITY = (8, 0)
LIBRARY = "_core.so"


def problems() -> Iterator[str]:
    """What is missing, a line each."""
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if missing:
        yield f"Python modules that cannot be imported: {', '.join(missing)}"
    package = ROOT / "vllm_moe_offload"
    if not (package / LIBRARY).exists():
        yield f"no vllm_moe_offload/{LIBRARY}: scripts/gpu_suite.sh builds it with setup.py"
    names = {point.name for point in entry_points(group="vllm.general_plugins")}
    if "moe_offload" not in names:
        yield (
            "no entry point moe_offload in vllm.general_plugins: put the project's root, with "
            "its egg-info, on PYTHONPATH"
        )
    if "torch" not in missing:
        yield from device_problems()


def device_problems() -> Iterator[str]:
    """About the CUDA device."""
    import torch

    if not torch.cuda.is_available():
        yield f"torch {torch.__version__} sees no CUDA device"
        return
    capability = torch.cuda.get_device_capability()
    print(
        f"{torch.cuda.get_device_name()}, compute capability {capability[0]}.{capability[1]}, "
        f"{torch.cuda.mem_get_info()[1] / (1 << 30):.1f} GiB; torch {torch.__version__}, "
        f"CUDA {torch.version.cuda}, Python {sys.version.split()[0]}"
    )
    if capability < LEAST_CAPABILITY:
        yield f"compute capability {capability}; {LEAST_CAPABILITY} is the least"


def main() -> int:
    """Prints problems to standard error."""
    found = list(problems())
    for problem in found:
        print(f"missing: {problem}", file=sys.stderr)
    for tool in ("nvidia-smi", "gcc"):
        print(f"{tool}: {shutil.which(tool) or 'not on PATH'}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
