"""``python -m vllm_moe_offload.cli``."""

import sys

from vllm_moe_offload.cli.program import main

sys.exit(main())
