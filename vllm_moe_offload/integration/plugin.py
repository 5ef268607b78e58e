"""``register()``: what happens in every vLLM process before anything is parsed or loaded."""

from __future__ import annotations

from vllm_moe_offload.integration import affinity

_registered = False


def register() -> None:
    """Adds the options to vLLM and prepares its workers; safe to call again.

    Raises:
        UnsupportedVLLM: this vLLM is not one the plugin knows, or has lost a place that
            the plugin hooks into. vLLM passes errors raised here on to the user.
    """
    global _registered
    if _registered:
        return
    affinity.remember()
    from vllm_moe_offload.integration import arguments, log_text, patches, patching

    log_text.install()
    patching.check_version()
    arguments.install()
    patches.install_worker_hook()
    patches.install_failure_hooks()
    _registered = True
