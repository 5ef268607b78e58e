"""``--moe-offload`` and ``--moe-offload-config``, on every command that has EngineArgs."""

from __future__ import annotations

import argparse
import json
import logging
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from vllm_moe_offload.config import MODES, OffloadConfig, OptionError, options, parse_options
from vllm_moe_offload.integration import (
    endpoint,
    failures,
    host_share,
    patching,
    speculation,
    supported,
    supported_gpu,
)
from vllm_moe_offload.integration.counters_dir import at_exit_of_creator, ensure_counters_dir

logger = logging.getLogger("vllm.moe_offload")

CLOSE_SECONDS = 60
"""How long a server that records a trace may take to write it."""
KEY = "moe_offload"
"""Where the options lie in ``VllmConfig.additional_config``."""


def options_of(vllm_config: VllmConfig) -> OffloadConfig:
    """The plugin's options in a vLLM configuration; mode ``off`` where there are none."""
    additional = vllm_config.additional_config
    return parse_options(additional.get(KEY, {}) if isinstance(additional, dict) else {})


# EngineArgs.add_cli_args, .from_cli_args (engine/arg_utils.py)
#   why: --moe-offload and its options, on every command that takes engine arguments.
#   upstream: vLLM's plugins cannot add arguments; --additional-config carries what they need,
#     and that is where the options go.
#   remove when: a plugin can register arguments.
# EngineArgs.create_engine_config (engine/arg_utils.py)
#   why: what cannot work with offload is refused, by name, before a process starts or a model
#     loads; on a GPU the MoE kernel is set, on a CPU the share of RAM that vLLM asks for.
#   upstream: no plugin hook receives the VllmConfig before it is used.
#   remove when: one does.
def install() -> None:
    """Wraps EngineArgs so that the options are parsed, carried and checked."""
    patching.wrap(EngineArgs, "add_cli_args", _add_cli_args, kind=staticmethod)
    patching.wrap(EngineArgs, "from_cli_args", _from_cli_args, kind=classmethod)
    patching.wrap(EngineArgs, "create_engine_config", _create_engine_config)


def _describe_options() -> str:
    lines = " ".join(option.summary for option in options() if option.name != "mode")
    return f"Options as JSON, or one by one as --moe-offload-config.KEY VALUE. {lines}"


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {text!r} ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object of options, got {text!r}")
    return value


def _add_cli_args(original: Any, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser = original(parser)
    group = parser.add_argument_group(
        title="MoE offload",
        description="Serve Mixture-of-Experts models whose experts do not fit in memory.",
    )
    group.add_argument(
        "--moe-offload",
        choices=MODES,
        default=argparse.SUPPRESS,  # else vLLM's help says "(default: None)" behind ours
        metavar="MODE",
        help="Keep experts in a store and cache them: " + ", ".join(MODES) + ". "
        "trace is the full system; off leaves vLLM untouched. (default: off)",
    )
    group.add_argument(
        "--moe-offload-config",
        type=_json_object,
        default=argparse.SUPPRESS,
        metavar="JSON",
        help=_describe_options().replace("%", "%%"),
    )
    return parser


def _from_cli_args(
    original: Any, cls: type[EngineArgs], args: argparse.Namespace
) -> EngineArgs:
    mode = getattr(args, "moe_offload", None)
    options: dict[str, Any] | None = getattr(args, "moe_offload_config", None)
    if mode is not None or options is not None:
        if mode is None and "mode" not in (options or {}):
            raise OptionError(
                "--moe-offload-config is given without --moe-offload; add --moe-offload=MODE, "
                f"MODE one of {', '.join(MODES)}"
            )
        additional = dict(getattr(args, "additional_config", None) or {})
        merged = {**additional.get(KEY, {}), **(options or {})}
        if mode is not None:
            merged["mode"] = mode
        additional[KEY] = merged
        # Into the namespace itself: further API servers get it pickled, and run vLLM's own
        # from_cli_args before this plugin is loaded there.
        args.additional_config = additional
    engine_args: EngineArgs = original(args)
    return engine_args


def _create_engine_config(
    original: Any, self: EngineArgs, *args: Any, **kwargs: Any
) -> VllmConfig:
    from vllm.platforms import current_platform

    additional = self.additional_config
    raw = additional.get(KEY, {}) if isinstance(additional, dict) else {}
    options = parse_options(raw)  # before the model's config is read: typos fail first
    vllm_config: VllmConfig = original(self, *args, **kwargs)
    if options.enabled:
        supported.check(vllm_config, options)
        speculation.prepare(vllm_config)
        if current_platform.is_cuda():
            supported_gpu.prepare(
                vllm_config, options, current_platform.get_device_capability()
            )
        elif not vllm_config.parallel_config.use_ray:  # else each worker does, where it is
            host_share.fit(vllm_config, vllm_config.parallel_config.local_world_size)
        from vllm_moe_offload.integration import preflight  # reads checkpoints; off does not

        preflight.check(vllm_config, options)
        _leave_time_to_close(vllm_config, options)
        ensure_counters_dir()
        endpoint.install()
        at_exit_of_creator(failures.tell)
        failures.begin()
    return vllm_config


def _leave_time_to_close(vllm_config: VllmConfig, options: OffloadConfig) -> None:
    """Without a shutdown timeout vLLM kills its workers at once, and the trace is lost."""
    if options.record_trace is not None and vllm_config.shutdown_timeout == 0:
        vllm_config.shutdown_timeout = CLOSE_SECONDS
        logger.info(
            "MoE offload: shutdown_timeout set to %d s, to write %s at exit",
            CLOSE_SECONDS,
            options.record_trace,
        )
