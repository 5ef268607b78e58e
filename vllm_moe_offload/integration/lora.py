"""LoRA beside offloaded experts: adapters of other modules are served, those of experts refused.

vLLM gives modules their adapters by replacing them, and with them the expert layers
(``FusedMoEWithLoRA``), whose weights it expects at their logical place. ``target_modules`` says which
modules are replaced; everything else stays as it was built. So experts must not be among them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

EXAMPLE = "--lora-target-modules q_proj k_proj v_proj o_proj"
_EXPERTS = re.compile(r"(^|\.)experts(\.|$)")
"""In names of modules: the routed ones; ``shared_experts`` are dense layers."""


def problems(lora_config: Any) -> Iterator[str]:
    """What about a LoRAConfig cannot go with offload, as far as names say; None: no LoRA."""
    if lora_config is None:
        return
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        yield (
            "enable_lora=True: vLLM has no kernel for CPUs that computes a model's experts once "
            "LoRA is on, whatever the adapters"
        )
        return
    targets = lora_config.target_modules
    if targets is None:
        yield (
            "enable_lora=True without lora_target_modules: adapters would apply to experts, too, "
            f"which lie in slots; name modules outside the experts, such as {EXAMPLE}"
        )
        return
    experts = [name for name in targets if _EXPERTS.search(name)]
    if experts:
        yield (
            f"lora_target_modules={experts}: adapters cannot apply to experts, which lie in slots; "
            f"allowed: modules outside the experts, such as {EXAMPLE}"
        )
