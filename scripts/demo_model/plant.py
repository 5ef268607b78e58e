"""The planted structure: directions of the residual stream that carry meaning."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scripts.demo_model.architectures import MLA_V_DIM
from scripts.demo_model.seeded import generator, normal
from scripts.demo_model.tokenizer import Vocabulary


@dataclass(frozen=True)
class Gains:
    """Strengths of the planted effects; chosen by measurement, see the tests.

    Attributes:
        anchor, topic, token: shares of a word's embedding (their squares sum to one).
        popularity, route_topic, route_token: standard deviations of the parts of a
            router's scores that depend on the layer alone, the topic, the token.
        experts, dense: root mean square of what all layers' experts (dense and shared
            networks) add to the residual stream, relative to the embedding.
        context: how much of the topics of the context all attention layers add.
        heard: how strongly all attention layers write down the words of the context.
        repeat: how much a word's share of the recent context counts against it (in
            units of log-probability for a share of one).
        logit_topic, logit_next: log-probability bonus of words of the own topic, and of
            planned successors.
        change: how much stronger than others the successor from the next topic is.
        common: log-probability bonus of common words.
        common_again: how much of it is lost (and more) right after a common word.
        recency: attention falls with distance d like d ** -(recency / 9).
    """

    anchor: float = 0.35
    topic: float = 0.55
    token: float = 0.76
    popularity: float = 0.65
    route_topic: float = 0.7
    route_token: float = 1.1
    experts: float = 0.6
    dense: float = 0.2
    context: float = 1.5
    heard: float = 2.0
    repeat: float = 28.0
    logit_topic: float = 7.0
    logit_next: float = 4.0
    change: float = 4.5
    common: float = 10.5
    common_again: float = 14.0
    recency: float = 20.0


GAINS = Gains()


def _unit_rows(rows: Tensor) -> Tensor:
    """``rows``, each scaled to length one."""
    scaled: Tensor = rows / rows.norm(dim=1, keepdim=True)
    return scaled


class Plant:
    """Directions of the residual stream that carry meaning, all of unit length.

    ``anchor`` [H], ``commonness`` [H] and ``topics`` [K, H] are orthogonal to each other
    and to every row of ``tokens`` [V, H].
    """

    def __init__(self, seed: int, hidden: int, num_topics: int, vocabulary: Vocabulary):
        rng = generator(seed, "plant")
        self.hidden = hidden
        self.vocabulary = vocabulary
        basis: Tensor = torch.linalg.qr(normal(rng, hidden, num_topics + 2)).Q.T
        self.anchor, self.commonness, self.topics = basis[0], basis[1], basis[2:]
        tokens = normal(rng, vocabulary.size, hidden)
        tokens -= tokens @ basis.T @ basis
        self.tokens = _unit_rows(tokens)
        # What attention reads of a word, and where it writes it: two random maps, so that
        # "was said" does not look like "is being said".
        maps = max(hidden, MLA_V_DIM)
        readers = normal(rng, maps, hidden)
        readers -= readers @ basis.T @ basis
        self.readers = _unit_rows(readers)
        self.writers = normal(rng, hidden, maps) / math.sqrt(hidden)
        self.seed = seed

    def embedding(self) -> Tensor:
        """Input embedding [V, H], rows of root mean square one."""
        rows = GAINS.anchor * self.anchor + GAINS.token * self.tokens
        for topic, words in enumerate(self.vocabulary.words):
            rows[words] += GAINS.topic * self.topics[topic]
        for token, topic in self.vocabulary.fragments.items():
            rows[token] += GAINS.topic * self.topics[topic]
        rows[self.vocabulary.common] += GAINS.topic * self.commonness
        return _unit_rows(rows) * math.sqrt(self.hidden)

    def output(self, read_words: int) -> Tensor:
        """Output embedding [V, H].

        Args:
            read_words: number of ``readers`` that attention layers use.
        """
        vocabulary = self.vocabulary
        bias = torch.full((vocabulary.size,), -12.0, dtype=torch.float64)
        rows = GAINS.logit_next / GAINS.token * (self._successors() @ self.tokens)
        for topic, words in enumerate(vocabulary.words):
            bias[words] = 0.0
            rows[words] += GAINS.logit_topic / GAINS.topic * self.topics[topic]
        bias[vocabulary.common] = GAINS.common
        # A common word rarely follows a common word.
        rows[vocabulary.common] -= GAINS.common_again / GAINS.topic * self.commonness
        bias[vocabulary.end] = 0.0
        rows += torch.outer(bias, self.anchor) / GAINS.anchor
        readers, writers = self.readers[:read_words], self.writers[:, :read_words]
        against = GAINS.repeat / GAINS.heard / GAINS.token * math.sqrt(self.hidden / read_words)
        rows += against * (self.tokens @ readers.T) @ writers.T
        return rows / math.sqrt(self.hidden)

    def _successors(self) -> Tensor:
        """[V, V]: how strongly row's word is planned to follow column's word, in 0..1."""
        rng = generator(self.seed, "successors")
        vocabulary = self.vocabulary
        follows = torch.zeros(vocabulary.size, vocabulary.size, dtype=torch.float64)
        for topic, words in enumerate(vocabulary.words):
            neighbour = vocabulary.words[(topic + 1) % len(vocabulary.words)]
            for word in words:
                for group, count, most in (
                    (words, 4, 1.0),
                    (vocabulary.common, 2, 1.0),
                    (neighbour, 1, GAINS.change),
                ):
                    chosen = torch.randperm(len(group), generator=rng)[:count]
                    strength = 0.5 + 0.5 * torch.rand(len(chosen), generator=rng).double()
                    follows[torch.tensor(group)[chosen], word] = most * strength
        follows[vocabulary.end, vocabulary.period] = 1.0
        return follows

    def router(self, rng: torch.Generator, experts: int) -> Tensor:
        """Router weight [E, H]: popularity, topic preferences and word preferences."""
        popularity = GAINS.popularity / GAINS.anchor * normal(rng, experts, 1)
        preference = GAINS.route_topic / GAINS.topic * normal(rng, experts, len(self.topics))
        words = GAINS.route_token / GAINS.token * normal(rng, experts, self.hidden)
        rows = popularity * self.anchor + preference @ self.topics + words
        return rows / math.sqrt(self.hidden)

    def read_rows(self, count: int) -> Tensor:
        """[count, H]: the topics, then as many word readers as there is room for."""
        return torch.cat([self.topics, self.readers[: count - len(self.topics)]])

    def write_columns(self, count: int, layers: int) -> Tensor:
        """[H, count]: where one of ``layers`` attention layers writes what it has read."""
        read_words = count - len(self.topics)
        # Few readers see little of a word: write that little all the louder.
        loudness = GAINS.heard * math.sqrt(self.hidden / read_words)
        words = -loudness * self.writers[:, :read_words]
        return torch.cat([GAINS.context * self.topics.T, words], dim=1) / layers
