"""Demo Mixture-of-Experts checkpoints: written offline, from a seed, of any size.

    python -m scripts.demo_model OUT [--arch ARCH] [--experts-gb X]

The result loads with vLLM and transformers like a checkpoint from the Hugging Face hub:
``config.json``, sharded safetensors, a tokenizer and a chat template. Nothing is trained.
Routers with random weights would route almost at random, which no cache can exploit and no
real model does, so the weights are *planted*:

* The residual stream of a token is a sum of known directions: a constant (``anchor``), the
  topic of the word (``topics``), and the word itself (``tokens``): ``plant``.
* Attention looks back with weights that fall with distance. It copies the topics of the
  context forward, so a request keeps to its topics, and it writes down which words were
  there, which the output layer holds against them, so that text does not run in circles:
  ``attention``.
* Each router scores experts by a layer's popularity (anchor), by topic and by word. Requests
  on one topic share experts, neighbouring tokens share more, and no two tokens share all.
* The output layer prefers words of the topic, and planned successors of the last word.

Experts are random: ``networks``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from scripts.demo_model.architectures import ARCHS, DemoModelError, Shape, expert_bytes

if TYPE_CHECKING:
    from scripts.demo_model.text import TOPICS
    from scripts.demo_model.write import write_demo_model

__all__ = ["ARCHS", "TOPICS", "DemoModelError", "Shape", "expert_bytes", "write_demo_model"]

_NEED_TORCH = {"TOPICS": "text", "write_demo_model": "write"}


def __getattr__(name: str) -> Any:
    """What needs torch, once it is asked for: plans and reports do without its seconds."""
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_NEED_TORCH[name]}"), name)
