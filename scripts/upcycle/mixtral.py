"""The upcycled checkpoint: a Mixtral's tensors from a Llama's, and its files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from scripts.demo_model.architectures import BF16_BYTES
from scripts.demo_model.seeded import generator
from scripts.demo_model.weights import Weight, window
from scripts.demo_model.write import (
    MAX_SHARD_BYTES,
    check_target,
    clear_checkpoint,
    write_json,
    write_shards,
)
from scripts.upcycle.dense import DenseModel, UpcycleError
from scripts.upcycle.observe import inputs_of_networks, project_text, windows
from scripts.upcycle.routers import router_of

PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""Mixtral's names of an expert's matrices, and Llama's of a feed-forward network's."""


@dataclass(frozen=True, slots=True)
class Choices:
    """What can be chosen; the defaults are those of the recorded traces.

    Attributes:
        experts: per layer.
        top_k: experts per token.
        noise: standard deviation of an expert's noise, in that of the matrix that it is
            added to.
        scale: of the routers, see ``routers.router_of``.
        tokens: of text that routers are made from.
        seed: of everything random.
    """

    experts: int = 16
    top_k: int = 2
    noise: float = 0.05
    scale: float = 8.0
    tokens: int = 8192
    seed: int = 0

    def check(self) -> None:
        """Raises UpcycleError if a value is impossible."""
        if self.experts < 2:
            raise UpcycleError(f"experts is {self.experts}; it must be at least 2")
        if not 1 <= self.top_k <= self.experts:
            raise UpcycleError(
                f"top-k is {self.top_k}; it must lie between 1 and experts ({self.experts})"
            )
        if not 0 <= self.noise < 1:
            raise UpcycleError(f"noise is {self.noise:g}; it must lie in [0, 1)")
        if not 0 < self.scale < float("inf"):
            raise UpcycleError(f"scale is {self.scale:g}; it must be positive")
        if self.tokens < 16 * self.experts:
            raise UpcycleError(
                f"tokens is {self.tokens}; it must be at least 16 for each of the "
                f"{self.experts} experts"
            )


def weights_of(
    dense: DenseModel, routers: Sequence[Tensor], choices: Choices
) -> Iterator[Weight]:
    """Every tensor of the Mixtral, in the order of the model.

    ``routers``: per layer ``[experts, hidden]``.
    """
    state: dict[str, Tensor] = dense.model.state_dict()
    yield _kept("model.embed_tokens.weight", state["model.embed_tokens.weight"])
    for layer, router in enumerate(routers):
        prefix = f"model.layers.{layer}"
        for name, tensor in state.items():
            if name.startswith(f"{prefix}.") and ".mlp." not in name:
                yield _kept(name, tensor)
        yield _kept(f"{prefix}.block_sparse_moe.gate.weight", router)
        matrices = {
            own: state[f"{prefix}.mlp.{theirs}.weight"] for own, theirs in PROJECTIONS.items()
        }
        deviations = {own: choices.noise * float(m.std()) for own, m in matrices.items()}
        for expert in range(choices.experts):
            for own in PROJECTIONS:
                name = f"{prefix}.block_sparse_moe.experts.{expert}.{own}.weight"
                yield _noisy(name, matrices[own], deviations[own], choices.seed)
    yield _kept("model.norm.weight", state["model.norm.weight"])
    # Where embeddings are tied, transformers names the one tensor twice.
    yield _kept("lm_head.weight", state["lm_head.weight"])


def _kept(name: str, tensor: Tensor) -> Weight:
    return Weight(name, tuple(tensor.shape), lambda rng: tensor)


def _noisy(name: str, tensor: Tensor, deviation: float, seed: int) -> Weight:
    noise = window(name, tuple(tensor.shape), deviation, seed)
    return Weight(name, noise.shape, lambda rng: tensor + noise.make(rng))


def config_of(dense: DenseModel, choices: Choices) -> dict[str, object]:
    """Everything that the Mixtral's config.json says."""
    kept = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act"),
        *("rms_norm_eps", "max_position_embeddings", "rope_parameters"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    )
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **{name: getattr(dense.config, name) for name in kept},
        "num_local_experts": choices.experts,
        "num_experts_per_tok": choices.top_k,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def expert_bytes(dense: DenseModel, choices: Choices) -> int:
    """Bytes of all experts, in bfloat16."""
    config = dense.config
    per_expert = 3 * config.hidden_size * config.intermediate_size * BF16_BYTES
    return int(config.num_hidden_layers * choices.experts * per_expert)


def upcycle(
    dense: DenseModel,
    out: Path,
    choices: Choices,
    *,
    texts: Sequence[str] | None = None,
    force: bool = False,
    progress: bool = False,
) -> None:
    """Writes the Mixtral to the directory ``out``.

    Args:
        dense: what it is made of.
        out: directory; created if it is missing.
        choices: see there.
        texts: routers are made from them; None: the project's own.
        force: replace a checkpoint that is in ``out``.
        progress: show a bar on stderr.

    Raises:
        UpcycleError: a choice is impossible, or the text too short.
        DemoModelError: ``out`` or the free disk space do not allow it; nothing was written.
    """
    choices.check()
    others = dense.model.num_parameters() + dense.config.vocab_size * dense.config.hidden_size
    needed = expert_bytes(dense, choices) + BF16_BYTES * others + 16_000_000
    check_target(out, needed, force, smaller="choose fewer --experts")
    ids = windows(dense, project_text() if texts is None else texts, choices.tokens)
    routers = [
        router_of(
            inputs, choices.experts, choices.scale, generator(choices.seed, f"router {layer}")
        )
        for layer, inputs in enumerate(inputs_of_networks(dense, ids))
    ]
    out.mkdir(parents=True, exist_ok=True)
    clear_checkpoint(out)
    dense.tokenizer.save_pretrained(out)
    weights = list(weights_of(dense, routers, choices))
    write_shards(out, weights, choices.seed, MAX_SHARD_BYTES, progress)
    config = config_of(dense, choices)
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(out / "generation_config.json", ends)
    # Last: a directory without config.json is not a checkpoint.
    write_json(out / "config.json", config)
