"""What each feed-forward network of a dense model sees on real text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.upcycle.dense import DenseModel, UpcycleError

ROOT = Path(__file__).resolve().parent.parent.parent
PROSE = ("README.md", "CONTRIBUTING.md", "docs/*.md")
CODE = ("scripts/**/*.py", "vllm_moe_offload/**/*.py", "csrc/*.h")
WINDOW = 256
"""Tokens that are read at a time, from different places of the text."""
SINK_TOKENS = 4
"""First tokens of a window, which are not counted: attention rests on them whatever the text
is, so their activations are far longer than all others and say nothing."""


def project_text(root: Path = ROOT) -> list[str]:
    """The project's documents and its sources: one text of each, in the order of their names.

    Raises:
        UpcycleError: ``root`` holds no such files.
    """
    texts = []
    for patterns in (PROSE, CODE):
        files = [file for pattern in patterns for file in sorted(root.glob(pattern))]
        texts.append("\n\n".join(file.read_text(encoding="utf-8") for file in files))
    if not any(texts):
        raise UpcycleError(f"{root} has neither {PROSE[0]} nor docs: run this from a clone")
    return texts


def windows(dense: DenseModel, texts: Sequence[str], tokens: int) -> Tensor:
    """Pieces of the texts, spread evenly over each.

    Args:
        dense: whose tokenizer counts.
        texts: get the same number of tokens each.
        tokens: of all pieces together, rounded up to whole ones.

    Returns:
        int64 ``[pieces, WINDOW]``.

    Raises:
        UpcycleError: a text has fewer tokens than its share.
    """
    pieces = -(-tokens // (WINDOW * len(texts)))
    found = []
    for text in texts:
        ids = torch.tensor(dense.tokenizer(text)["input_ids"])
        if len(ids) < pieces * WINDOW:
            raise UpcycleError(
                f"tokens is {tokens}; the project's text has {len(texts) * len(ids)} at most"
            )
        starts = torch.linspace(0, len(ids) - WINDOW, pieces).long()
        found += [ids[start : start + WINDOW] for start in starts.tolist()]
    return torch.stack(found)


@torch.inference_mode()
def inputs_of_networks(dense: DenseModel, ids: Tensor) -> list[Tensor]:
    """What every layer's feed-forward network is given.

    Args:
        dense: the model; not changed.
        ids: int64 ``[pieces, WINDOW]``.

    Returns:
        Per layer, float32 ``[pieces * (WINDOW - SINK_TOKENS), hidden]``.
    """
    layers = dense.model.model.layers
    seen: list[list[Tensor]] = [[] for _ in layers]

    def watch(index: int) -> Any:
        def hook(module: object, inputs: tuple[Tensor, ...]) -> None:
            hidden = inputs[0][:, SINK_TOKENS:].float()
            seen[index].append(hidden.reshape(-1, hidden.shape[-1]).clone())

        return hook

    handles = [
        layer.mlp.register_forward_pre_hook(watch(index)) for index, layer in enumerate(layers)
    ]
    try:
        for start in range(0, len(ids), 4):
            dense.model.model(ids[start : start + 4], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(parts) for parts in seen]
