"""Kernels need Triton, which a CPU environment does not have: ``make test-triton`` brings it.

Its interpreter is chosen when a kernel is declared, so a process either interprets or compiles.
"""

import os

if os.environ.get("VMO_TRITON_TESTS") != "1":
    collect_ignore_glob = ["test_*.py"]
elif os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = ["test_compiled_*.py"]
else:
    collect_ignore_glob = ["test_interpreted_*.py"]
