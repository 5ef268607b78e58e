"""Made-up routing with the structure of real models, for tests and benchmarks.

Every request belongs to a topic, every token to a kind (kinds follow each other in runs).
Topic and kind shift each layer's router logits, noise does the rest: adjacent tokens reuse
experts, requests of a topic resemble each other, and layers agree about a token.
"""

from __future__ import annotations

import numpy as np

from vllm_moe_offload.trace.routing import RoutingTrace, id_dtype


def synthetic_trace(
    *,
    layers: int = 6,
    experts: int = 32,
    top_k: int = 4,
    requests: int = 16,
    tokens: int = 100,
    topics: int = 5,
    kinds: int = 24,
    stickiness: float = 0.4,
    topic_spread: float = 1.2,
    kind_spread: float = 1.2,
    sequence: float = 0.0,
    drift: float = 0.0,
    prompt: int = 0,
    seed: int = 0,
) -> RoutingTrace:
    """A trace of ``requests`` requests of about ``tokens`` generated tokens each.

    Args:
        layers, experts, top_k: of the model.
        topics: kinds of requests.
        kinds: kinds of tokens.
        stickiness: probability that a token is of the same kind as the one before.
        topic_spread, kind_spread: standard deviation of what topic and kind add to a
            router's logits; with both 0, tokens are independent of each other.
        sequence: probability that a token is of the kind that follows the last one's in a
            fixed cycle.
        drift: standard deviation of the random walk that each expert's popularity does per
            token.
        prompt: prompt tokens of every request, before the generated ones.
        seed: the same seed gives the same trace.
    """
    generator = np.random.default_rng(seed)
    of_model = generator.normal(0.0, 0.4, (layers, experts))
    of_topic = generator.normal(0.0, topic_spread, (topics, layers, experts))
    of_kind = generator.normal(0.0, kind_spread, (kinds, layers, experts))
    favourites = generator.dirichlet(np.full(kinds, 0.3), topics)
    lens = prompt + np.maximum(generator.poisson(tokens, requests), 1)
    ids = np.empty((int(lens.sum()), layers, top_k), id_dtype(experts))
    topic_of = generator.integers(0, topics, requests)
    row = 0
    for topic, length in zip(topic_of, lens, strict=True):
        kind = generator.choice(kinds, p=favourites[topic])
        for _ in range(length):
            if sequence and generator.random() < sequence:
                kind = (kind + 1) % kinds
            elif generator.random() > stickiness:
                kind = generator.choice(kinds, p=favourites[topic])
            if drift:
                of_model += generator.normal(0.0, drift, of_model.shape)
            logits = of_model + of_topic[topic] + of_kind[kind]
            logits = logits + generator.normal(0.0, 0.6, logits.shape)
            ids[row] = np.argpartition(-logits, top_k - 1, axis=1)[:, :top_k]
            row += 1
    return RoutingTrace(
        ids=ids,
        starts=(np.cumsum(lens) - lens).astype(np.int64),
        lens=lens.astype(np.int64),
        num_experts=experts,
        names=[f"topic{topic}/{index}" for index, topic in enumerate(topic_of)],
        prefill_lens=np.full(requests, prompt, np.int64) if prompt else None,
    )
