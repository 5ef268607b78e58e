"""``vllm-moe-offload``: plan a server, replay routing traces, look into them.

Every subcommand is a module with a :class:`~vllm_moe_offload.cli.command.Command`; add it to
:data:`COMMANDS` to add another.
"""

from vllm_moe_offload.cli.program import COMMANDS, build_parser, main

__all__ = ["COMMANDS", "build_parser", "main"]
