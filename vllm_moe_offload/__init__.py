"""vllm-moe-offload: serve Mixture-of-Experts models bigger than memory with stock vLLM.

Importing this package imports nothing heavy: vLLM swallows import errors of plugins, so
all that can fail happens inside :func:`register`, whose errors reach the user.
"""

__version__ = "0.1.0"


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``; runs in every vLLM process."""
    from vllm_moe_offload.integration import plugin

    plugin.register()
