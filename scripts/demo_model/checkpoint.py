"""All tensors of one demo model, none of them made yet."""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import Tokenizer

from scripts.demo_model.architectures import MAX_POSITIONS, Shape
from scripts.demo_model.attention import Attention, LatentAttention
from scripts.demo_model.networks import Networks
from scripts.demo_model.plant import Plant
from scripts.demo_model.text import TOPICS
from scripts.demo_model.tokenizer import PAD, Vocabulary
from scripts.demo_model.weights import Weight, constant


class Checkpoint:
    """A model's parts and the order of their tensors."""

    def __init__(
        self,
        arch: str,
        shape: Shape,
        seed: int,
        tokenizer: Tokenizer,
        *,
        max_positions: int = MAX_POSITIONS,
        shared_noise: bool = False,
    ) -> None:
        self.arch, self.shape, self.max_positions = arch, shape, max_positions
        self.num_topics = min(len(TOPICS), shape.hidden // 4)
        self.vocabulary = Vocabulary.of(tokenizer, self.num_topics)
        self.pad = tokenizer.token_to_id(PAD)
        self.plant = Plant(seed, shape.hidden, self.num_topics, self.vocabulary)
        kind = LatentAttention if arch == "deepseek_v2" else Attention
        self.attention = kind(arch, shape, self.plant)
        self.networks = Networks(arch, shape, seed, self.plant, shared_noise=shared_noise)

    def weights(self) -> Iterator[Weight]:
        """Every tensor, in the order of the model."""
        table = (self.vocabulary.size, self.shape.hidden)
        read_words = self.attention.value_width - self.num_topics
        yield Weight("model.embed_tokens.weight", table, lambda rng: self.plant.embedding())
        for layer in range(self.shape.layers):
            yield from self._layer(layer)
        yield constant("model.norm.weight", self.shape.hidden)
        yield Weight("lm_head.weight", table, lambda rng: self.plant.output(read_words))

    def _layer(self, layer: int) -> Iterator[Weight]:
        prefix = f"model.layers.{layer}"
        yield constant(f"{prefix}.input_layernorm.weight", self.shape.hidden)
        yield from self.attention.weights(f"{prefix}.self_attn")
        yield constant(f"{prefix}.post_attention_layernorm.weight", self.shape.hidden)
        yield from self.networks.weights(prefix, layer)
