"""What `vllm serve` says before it starts an engine: a command line for each message of the page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Change = Callable[[Path], None]
OPTION, OTHER = 2, 1
"""Exit statuses: an option, or the model it names, is to blame; the installation is."""


@dataclass(frozen=True)
class Case:
    """A command line that ends with a message.

    Attributes:
        options: beside the model; ``{tmp}`` is an empty directory, ``{model}`` the model's.
        mode: whether ``--moe-offload=trace`` is among them.
        change: spoils a copy of the model first.
        patch: function of :mod:`tests.messages.patches` that makes the situation.
        environment: what is set for the command.
        status: how it ends.
    """

    options: tuple[str, ...] = ()
    mode: bool = True
    change: Change | None = None
    patch: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    status: int = OPTION


def option(key: str, value: str, **more: object) -> Case:
    """One of the plugin's options, one by one."""
    return Case((f"--moe-offload-config.{key}", value), **more)  # type: ignore[arg-type]


def given(*options: str, **more: object) -> Case:
    """Options of vLLM."""
    return Case(options, **more)  # type: ignore[arg-type]


# ---- models that are spoilt --------------------------------------------------------------


def weights(model: Path) -> Path:
    """The only file of the demo model's weights."""
    (path,) = model.glob("*.safetensors")
    return path


def dense(model: Path) -> None:
    """A config.json without experts."""
    config = json.loads((model / "config.json").read_text())
    for key in ("num_local_experts", "num_experts_per_tok"):
        del config[key]
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (model / "config.json").write_text(json.dumps(config))


def pickled(model: Path) -> None:
    """Weights of another format."""
    weights(model).rename(model / "pytorch_model.bin")
    (model / "model.safetensors.index.json").unlink()


def rewrite(model: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Changes tensors where they are."""
    path = weights(model)
    save_file({name: change(name, value) for name, value in load_file(path).items()}, path)


def bytes_for_experts(model: Path) -> None:
    """Experts of a type that is none of ours, whatever config.json says."""
    rewrite(model, lambda name, value: value.to(torch.int16) if ".experts." in name else value)


def cut(model: Path) -> None:
    """A file that ends early."""
    path = weights(model)
    path.write_bytes(path.read_bytes()[:-5000])


def without_a_file(model: Path) -> None:
    """An index that names a file more."""
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = "model-00002-of-00002.safetensors"
    path.write_text(json.dumps(index))


def without_weight_map(model: Path) -> None:
    """An index without its map."""
    (model / "model.safetensors.index.json").write_text("{}")


# ---- the messages ------------------------------------------------------------------------

HERE = "--moe-offload=... is not possible here"

SERVE: dict[str, Case] = {
    # The options are not there
    "vllm serve: error: unrecognized arguments: --moe-offload=trace": Case(
        environment={"VLLM_PLUGINS": ""}
    ),
    "argument --moe-offload: invalid choice": given("--moe-offload=fifo", mode=False),
    # Installation and version
    "the C++ core of vllm-moe-offload is not built: no ... in ...": Case(
        patch="without_core", status=OTHER
    ),
    "the C++ core ... has interface ..., this code needs ...": Case(
        environment={"VMO_CORE_LIBRARY": "libm.so.6"}, status=OTHER
    ),
    "vllm-moe-offload ... supports ..., but vLLM ... is installed. Install a supported vLLM, or "
    "uninstall vllm-moe-offload.": Case(patch="older_vllm", status=OTHER),
    "cannot read the version of vLLM: ...": Case(patch="unversioned_vllm", status=OTHER),
    "vLLM ... has no ..., which vllm-moe-offload hooks into; supported is ...": Case(
        patch="vllm_without_a_hook", status=OTHER
    ),
    "... of vLLM ... is not a ...": Case(patch="vllm_with_another_hook", status=OTHER),
    # Options
    "--moe-offload-config is given without --moe-offload; add --moe-offload=MODE, MODE one of "
    "...": option("cache_gb", "1", mode=False),
    "not JSON: ...": given("--moe-offload-config", "{"),
    "must be a JSON object of options, got ...": given("--moe-offload-config", "3"),
    "moe_offload must be a mapping of options, got ...; allowed keys: ...": given(
        "--additional-config", '{"moe_offload": 3}', mode=False
    ),
    "moe-offload: unknown option ...; allowed: ...": option("cachegb", "1"),
    "moe-offload: ...=... is not possible: ...": option("prefetch", "perhaps"),
    "allowed: ...": option("cache_gb", "lots"),
    "allowed: ...; a share lies in (0%, 100%]": option("cache_gb", "101%"),
    "must end in .npz": option("record_trace", "trace.json"),
    'must end in .msgpack, or be "none"': option("trace_path", "trace.npz"),
    "there is no directory ...": option("trace_path", "{tmp}/none/trace.msgpack"),
    "... is not writable": option(
        "record_trace", "{tmp}/trace.npz", patch="nothing_but_stores_writable"
    ),
    "moe-offload: cache_gb=... holds ... of ... experts of ... bytes, but one token needs ... "
    "Minimum: ... GiB; ... GiB hold one layer (recommended at least: exact output).": option(
        "cache_gb", "0.00001"
    ),
    # What cannot go together
    f"{HERE}; change what is named, or use --moe-offload=off: ...": given(
        "--enable-lora", "--cpu-offload-gb", "1"
    ),
    "host_gb=...: without a GPU experts are cached in RAM; see cache_gb": option(
        "host_gb", "1"
    ),
    "model ... is dense: it has no routed experts to offload": Case(change=dense),
    "quantization=...: no kernel for such experts is known to compute on cache slots; allowed "
    "here: ...": given("--quantization", "experts_int8"),
    "enable_lora=True: vLLM has no kernel for CPUs that computes a model's experts once LoRA is "
    "on, whatever the adapters": given("--enable-lora"),
    "speculative_config.method=...: what such a drafter does in a step was not looked into; "
    "allowed: ...": given(
        "--speculative-config", '{"method": "ngram_gpu", "num_speculative_tokens": 2}'
    ),
    "...=...: ranks would compute each other's tokens, and whose request one belongs to is not "
    "known here; allowed: 1": given("--data-parallel-size", "2"),
    "pipeline_parallel_size=... with enforce_eager=True: vLLM's CPU worker makes room for what a "
    "stage is sent when it warms up compiled code, and fails at the first request without; leave "
    "enforce_eager out": given("--pipeline-parallel-size", "2", "--enforce-eager"),
    "distributed_executor_backend='ray': Ray is not installed; "
    "pip install 'vllm-moe-offload[ray]'": given(
        "--distributed-executor-backend=ray", patch="without_ray"
    ),
    "distributed_executor_backend='ray' on a CPU: set ...=1, here and before 'ray start' on "
    "every node": given("--distributed-executor-backend=ray"),
    "distributed_executor_backend='ray' with VLLM_TARGET_DEVICE='cpu': vLLM's own platform, which "
    "is then taken, has no workers on Ray; unset the variable, here and before 'ray start' on "
    "every node": given(
        "--distributed-executor-backend=ray", environment={"VLLM_TARGET_DEVICE": "cpu"}
    ),
    "VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0: vLLM's older executor on Ray was never run with offload; "
    "allowed: 1": given(
        "--distributed-executor-backend=ray",
        environment={"VLLM_USE_RAY_V2_EXECUTOR_BACKEND": "0", "VLLM_MOE_OFFLOAD_RAY_CPU": "1"},
    ),
    "load_format=...: stores are built from safetensors files, by a reader of the plugin's; "
    "allowed: ...": given("--load-format", "sharded_state"),
    "cpu_offload_gb=...: vLLM's own offloader cannot hold the same weights": given(
        "--cpu-offload-gb", "1"
    ),
    "offload_group_size=...: vLLM's prefetch offloader cannot hold the same weights": given(
        "--offload-group-size", "2"
    ),
    "weight_transfer_config: weights cannot be replaced while the store holds them": given(
        "--weight-transfer-config", '{"backend": "nccl"}'
    ),
    # The model or its checkpoint
    "--moe-offload: ... holds no safetensors files; convert the checkpoint (pickled weights are "
    "neither safe nor seekable)": Case(change=pickled),
    "--moe-offload: ... in ... is ...; experts must be one of ... Use --moe-offload=off": Case(
        change=bytes_for_experts
    ),
    "... is no safetensors file, or damaged: ...": Case(change=cut),
    "... has no weight_map": Case(change=without_weight_map),
    "... is incomplete: ... of ... files of ... are missing, such as ...": Case(
        change=without_a_file
    ),
    # The store
    "cannot create ... for the expert store: ...": option("store_dir", "{model}/config.json"),
    "... belongs to user ..., not to you (user ...)": option(
        "store_dir", "{tmp}", patch="another_user"
    ),
    "... is not writable ...; set store_dir to a directory of your own": option(
        "store_dir", "{tmp}", patch="nothing_writable"
    ),
    "cannot write the expert store ... are free; set store_dir to a directory on a disk with "
    "enough space": option("store_dir", "{tmp}", patch="full_disk"),
}
"""By message, as the page has it."""
