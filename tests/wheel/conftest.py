"""Tests beside vLLM's wheel for CUDA, in an environment of its own: ``make test-wheel`` brings it.

Triton's interpreter is chosen when a kernel is declared, so a process either interprets or compiles.
"""

import os

if "VMO_WHEEL" not in os.environ:
    collect_ignore_glob = ["test_*.py"]
elif os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = ["test_installed.py"]
    # vLLM knows no platform here. The CPU's has what the runners ask for, and vLLM itself is CUDA's.
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()
else:
    collect_ignore_glob = ["test_runner.py"]
