"""LoRA in workers with offload: expert layers stay as they are, and adapters leave them alone.

What names alone can say was refused before (:mod:`lora`); here are the model and the adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from vllm.lora.utils import is_in_target_modules, process_packed_modules_mapping
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.models import supports_lora

from vllm_moe_offload.config import OptionError
from vllm_moe_offload.integration.experts import find_runtime
from vllm_moe_offload.integration.lora import EXAMPLE
from vllm_moe_offload.integration.patching import wrap


def check(model: torch.nn.Module, lora_config: Any) -> None:
    """Raises OptionError if vLLM is going to replace one of the model's expert layers.

    Asks as vLLM does (``LoRAModelManager._create_lora_modules``): beside names, a model's own
    mapping of packed modules selects, too.
    """
    if lora_config is None or not supports_lora(model):  # which vLLM says then
        return
    packed = process_packed_modules_mapping(
        model,
        force_2d_moe=lora_config.enable_mixed_moe_lora_format,
        enable_moe_shared_loras=lora_config.enable_moe_shared_loras,
    )
    for name in _expert_layers(model):
        if is_in_target_modules(name, lora_config.target_modules, packed):
            raise OptionError(
                f"--moe-offload: lora_target_modules={lora_config.target_modules} selects {name}, "
                "whose experts lie in slots; name modules outside the experts, such as "
                f"{EXAMPLE}"
            )


def _expert_layers(model: torch.nn.Module) -> Iterator[str]:
    """Names of the modules that vLLM replaces to give experts adapters."""
    for name, module in model.named_modules():
        if isinstance(module, MoERunner):
            yield name


# WorkerLoRAManager._load_adapter (lora/worker_manager.py)
#   why: with target_modules vLLM takes adapters of experts and leaves those weights out; the
#     answers would be of a model that nobody trained.
#   upstream: LoRAModelManager.activate_adapter (lora/model_manager.py) looks at wrapped modules.
#   remove when: vLLM refuses adapters that have weights for other modules than target_modules.
def install_in_worker() -> None:
    """Refuses adapters of experts where experts are offloaded."""
    from vllm.lora.worker_manager import WorkerLoRAManager

    wrap(WorkerLoRAManager, "_load_adapter", load_adapter)


def load_adapter(original: Any, lora_manager: Any, request: Any) -> Any:
    """``WorkerLoRAManager._load_adapter``: the adapter, unless it has weights for experts.

    Raises:
        OptionError: it has; names adapter and module.
    """
    adapter = original(lora_manager, request)
    model = lora_manager._adapter_manager.model
    if find_runtime(model) is None:
        return adapter
    layers = list(_expert_layers(model))
    for name in adapter.loras:
        if any(name == layer or name.startswith(f"{layer}.") for layer in layers):
            raise OptionError(
                f"--moe-offload: LoRA adapter {request.lora_name!r} has weights for {name}: "
                "experts lie in slots, and adapters cannot apply to them. Train or export it "
                "without them, or merge it into the checkpoint"
            )
    return adapter
