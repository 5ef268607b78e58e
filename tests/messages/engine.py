"""What `vllm serve` says of an engine that did not start, or ended: found by its processes."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.messages.serve import OPTION, OTHER, Case, given, weights


def without_experts_of_a_layer(model: Path) -> None:
    """A checkpoint whose last layer has none."""
    path = weights(model)
    tensors = {
        name: tensor
        for name, tensor in load_file(path).items()
        if not (".layers.2." in name and ".experts." in name)
    }
    save_file(tensors, path)
    (model / "model.safetensors.index.json").unlink()


ENGINE: dict[str, Case] = {
    # By the workers of both ranks.
    "--moe-offload: the model has experts in ..., but the checkpoint names experts in layers ...; "
    "this checkpoint is not supported, use --moe-offload=off": given(
        "--tensor-parallel-size",
        "2",
        change=without_experts_of_a_layer,
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        status=OPTION,
    ),
    # By the engine core: vLLM's own reason, before it starts a worker.
    "the engine did not start: ...": Case(
        environment={"VLLM_CPU_OMP_THREADS_BIND": "everywhere"}, status=OTHER
    ),
    # By a worker that serves: its store is cut meanwhile.
    "MoE offload: the engine ended: ...": Case(status=OTHER),
    "cannot read expert ... of layer ... from ... (byte ...): ...; start the server again, which "
    "builds a damaged store again, and look at the disk if this comes again": Case(
        status=OTHER
    ),
}
"""By message, as the page has it; the last two are of one server."""
