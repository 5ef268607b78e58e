#!/usr/bin/env python
"""Write a demo Mixture-of-Experts checkpoint: offline, from a seed, of any size.

The result loads with vLLM and transformers like a checkpoint from the Hugging Face hub:
``config.json``, sharded safetensors, a tokenizer and a chat template. Nothing is trained.
Routers with random weights would route almost at random, which no cache can exploit and no
real model does, so the weights are *planted*:

* The residual stream of a token is a sum of known directions: a constant (``anchor``), the
  topic of the word (``topics``), and the word itself (``tokens``).
* Attention looks back with weights that fall with distance. It copies the topics of the
  context forward, so a request keeps to its topics, and it writes down which words were
  there, which the output layer holds against them, so that text does not run in circles.
* Each router scores experts by a layer's popularity (anchor), by topic and by word. Requests
  on one topic share experts, neighbouring tokens share more, and no two tokens share all.
* The output layer prefers words of the topic, and planned successors of the last word.

Experts are random networks. Their outputs are small beside the residual stream, so topics
survive all layers, but large enough that one wrong expert changes the log-probabilities.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm

BF16_BYTES = 2
ALIGNMENT = 32
"""vLLM's CPU kernel for unquantised experts wants both dimensions divisible by this."""
MAX_SHARD_BYTES = 1_000_000_000
MAX_POSITIONS = 8192

_YARN: dict[str, object] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": MAX_POSITIONS // 2,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}

# vLLM's CPU kernels for latent attention are compiled for a latent of 512 + 64.
MLA_RANK = 512
MLA_ROPE_DIM = 64
MLA_NOPE_DIM = 128
MLA_V_DIM = 128


class DemoModelError(ValueError):
    """What was asked for cannot be written; the message says why and what can."""


# ---------------------------------------------------------------------------
# Shapes and sizes
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. ``intermediate`` is the width of one routed expert."""

    layers: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int


@dataclass(frozen=True)
class Arch:
    """What distinguishes one architecture from another.

    Attributes:
        default: shape without any flags; about 0.3 GB of experts.
        class_name: the entry of ``architectures`` in config.json.
        dense_layers: leading layers without experts.
        renormalize: whether the weights of the chosen experts are scaled to sum to one.
        expert_names: checkpoint names of an expert's gate, up and down projection.
        moe_name: checkpoint name of the block that holds router and experts.
        act_rms: root mean square of the activation for unit normal input.
    """

    default: Shape
    class_name: str
    dense_layers: int = 0
    renormalize: bool = True
    expert_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    moe_name: str = "mlp"
    act_rms: float = 0.6


ARCHS: dict[str, Arch] = {
    "mixtral": Arch(
        Shape(layers=12, experts=16, top_k=2, hidden=512, intermediate=512),
        "MixtralForCausalLM",
        expert_names=("w1", "w3", "w2"),
        moe_name="block_sparse_moe",
    ),
    "qwen3_moe": Arch(
        Shape(layers=12, experts=64, top_k=8, hidden=512, intermediate=128),
        "Qwen3MoeForCausalLM",
    ),
    "deepseek_v2": Arch(
        Shape(layers=13, experts=64, top_k=6, hidden=512, intermediate=128),
        "DeepseekV2ForCausalLM",
        dense_layers=1,
        renormalize=False,
    ),
    "gpt_oss": Arch(
        Shape(layers=12, experts=32, top_k=4, hidden=512, intermediate=256),
        "GptOssForCausalLM",
        act_rms=1.0,
    ),
    "olmoe": Arch(
        Shape(layers=12, experts=64, top_k=8, hidden=512, intermediate=128),
        "OlmoeForCausalLM",
        renormalize=False,
    ),
}

SHARED_EXPERTS = 2
"""Shared experts of a DeepSeek layer, each as wide as a routed one."""

_CHOICES: dict[str, Sequence[int]] = {
    "layers": range(2, 49),
    "experts": (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256),
    "hidden": (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096),
}
_WIDTHS = (*range(32, 1024, 32), *range(1024, 14337, 128))
_RELUCTANCE = {"layers": 1.0, "experts": 1.0, "hidden": 4.0, "intermediate": 4.0}
_SIZE_TOLERANCE = 0.05


def expert_bytes(arch: str, shape: Shape) -> int:
    """Bytes of all routed experts, biases included, in bfloat16."""
    values = 3 * shape.hidden * shape.intermediate
    if arch == "gpt_oss":
        values += 2 * shape.intermediate + shape.hidden
    moe_layers = shape.layers - ARCHS[arch].dense_layers
    return BF16_BYTES * moe_layers * shape.experts * values


def check_shape(arch: str, shape: Shape) -> None:
    """Raise :class:`DemoModelError` unless vLLM can run ``shape`` as ``arch``."""
    for name in ("hidden", "intermediate"):
        value = getattr(shape, name)
        if value <= 0 or value % ALIGNMENT:
            raise DemoModelError(
                f"{name} is {value}; vLLM's CPU kernel needs a positive multiple of {ALIGNMENT}"
            )
    least_layers = ARCHS[arch].dense_layers + 1
    if shape.layers < least_layers:
        raise DemoModelError(
            f"layers is {shape.layers}; {arch} needs at least {least_layers}"
            + (" (the first is dense)" if least_layers > 1 else "")
        )
    if shape.experts < 2:
        raise DemoModelError(f"experts is {shape.experts}; at least 2 are needed")
    if not 1 <= shape.top_k <= shape.experts:
        raise DemoModelError(
            f"top-k is {shape.top_k}; it must lie between 1 and experts ({shape.experts})"
        )


def fit_shape(arch: str, gigabytes: float, fixed: dict[str, int]) -> Shape:
    """Shape with about ``gigabytes`` (1e9 bytes) of experts, near the default's proportions.

    Layers and experts change first, dimensions half as readily.

    Args:
        fixed: fields of :class:`Shape` that must keep the given value.

    Raises:
        DemoModelError: no shape with the fixed fields comes close to the size.
    """
    if not (math.isfinite(gigabytes) and gigabytes > 0):
        raise DemoModelError(f"experts-gb is {gigabytes}; it must be a positive number of GB")
    default = replace(ARCHS[arch].default, **fixed)

    def miss(shape: Shape) -> float:
        return abs(expert_bytes(arch, shape) / (gigabytes * 1e9) - 1)

    def cost(shape: Shape) -> float:
        stretch = [
            math.log(getattr(shape, name) / getattr(default, name)) ** 2 * reluctance
            for name, reluctance in _RELUCTANCE.items()
        ]
        return miss(shape) + sum(stretch)

    candidates = list(_candidates(arch, gigabytes, default, fixed))
    near = [shape for shape in candidates if miss(shape) <= _SIZE_TOLERANCE]
    if not near:
        held = ", ".join(f"{k}={v}" for k, v in fixed.items()) or "every shape considered"
        sizes = [expert_bytes(arch, shape) / 1e9 for shape in candidates]
        raise DemoModelError(
            f"experts-gb is {gigabytes:g}; with {held} no {arch} model comes within "
            f"{_SIZE_TOLERANCE:.0%} of it (the nearest has "
            f"{min(sizes, key=lambda size: abs(size - gigabytes)):.3g} GB)"
        )
    return min(near, key=cost)


def _candidates(
    arch: str, gigabytes: float, default: Shape, fixed: dict[str, int]
) -> Iterator[Shape]:
    """Shapes around ``gigabytes``: all layers, experts and hidden sizes, two widths each."""
    free = [name for name in _CHOICES if name not in fixed]
    for values in product(*(_CHOICES[name] for name in free)):
        shape = replace(default, **dict(zip(free, values, strict=True)))
        if shape.top_k > shape.experts or shape.layers <= ARCHS[arch].dense_layers:
            continue
        if "intermediate" in fixed:
            yield shape
            continue
        one = expert_bytes(arch, replace(shape, intermediate=ALIGNMENT)) / ALIGNMENT
        above = bisect_left(_WIDTHS, gigabytes * 1e9 / one)
        for width in _WIDTHS[max(above - 1, 0) : above + 1]:
            yield replace(shape, intermediate=width)


def resolve_shape(arch: str, gigabytes: float | None, flags: dict[str, int | None]) -> Shape:
    """Shape from the command line: explicit flags win, then the size, then the default."""
    fixed = {name: value for name, value in flags.items() if value is not None}
    default = ARCHS[arch].default
    if "experts" in fixed and "top_k" not in fixed:
        fixed["top_k"] = max(1, min(default.top_k, fixed["experts"]))
    shape = replace(default, **fixed)
    if gigabytes is not None and "experts" not in fixed:
        shape = replace(shape, experts=max(shape.experts, shape.top_k))
    # Before the size: an impossible flag is reported as such, not as an unreachable size.
    check_shape(arch, shape)
    return shape if gigabytes is None else fit_shape(arch, gigabytes, fixed)


# ---------------------------------------------------------------------------
# Text and tokenizer
# ---------------------------------------------------------------------------

TOPICS: dict[str, str] = {
    "sea": "ship captain harbor sail anchor tide wave deck sailor island coast storm whale "
    "crew mast rope voyage fleet lighthouse reef salt net pier dolphin",
    "kitchen": "bread butter oven recipe flour sugar onion soup pepper garlic cook knife plate "
    "cheese tomato sauce taste spice dough pan roast lemon honey cream",
    "music": "song piano violin melody rhythm chord concert singer guitar drum orchestra note "
    "tune choir opera flute harmony jazz trumpet stage audience band lyric bass",
    "space": "star planet orbit rocket comet galaxy moon telescope gravity astronaut mars "
    "satellite launch eclipse meteor cosmos probe nebula crater lunar solar jupiter dust beam",
    "garden": "flower seed soil rose leaf root tulip hedge lawn bloom petal spade compost vine "
    "orchard apple pear bee butterfly shrub weed rain pot greenhouse",
    "law": "court judge lawyer contract verdict witness trial jury appeal clause statute crime "
    "evidence plaintiff defense sentence police oath justice treaty claim rights ruling fine",
    "code": "function variable compiler loop array string pointer debug thread memory kernel "
    "cache parser class module import return integer binary server query index commit branch",
    "sport": "team goal player coach match score ball referee league stadium race runner medal "
    "tennis hockey champion training sprint defender penalty trophy season fans kick",
    "medicine": "doctor patient nurse hospital fever surgery vaccine symptom dose blood heart "
    "lung disease therapy clinic bone wound virus allergy pulse cure infection drug diet",
    "money": "bank market price stock loan interest profit trade investor budget tax currency "
    "debt credit account wage export bond dividend merchant coin revenue cost auction",
    "school": "teacher student lesson exam book pencil homework library essay classroom grade "
    "college lecture professor chalk campus diploma notebook science history reading spelling "
    "quiz degree",
    "weather": "cloud snow wind thunder frost sunshine fog breeze hail drought humid forecast "
    "temperature lightning blizzard rainbow mist winter summer autumn climate heat flood ice",
    "war": "army soldier battle sword general castle siege shield enemy victory tank bomb "
    "cavalry fortress king conquest border truce spy weapon regiment rebel knight invasion",
    "maths": "number equation theorem proof algebra geometry triangle circle angle sum prime "
    "matrix vector integral fraction root polynomial axiom logic limit probability square "
    "curve digit",
    "animals": "dog cat horse lion tiger rabbit wolf bear eagle snake elephant monkey deer fox "
    "mouse sheep goat owl zebra camel turtle frog goose hawk",
    "travel": "train ticket airport hotel luggage passport map road bridge mountain desert "
    "village tourist journey bus station border guide tent camping river valley museum "
    "souvenir",
}
"""Words of each topic; a word listed twice belongs to the topic that names it first."""

_COMMON_TEXT = (
    "the of and to in a is that it with for on as was at by from this are be or an not but "
    "they we you have his her its their which will can all one more about into over near"
)
COMMON = tuple(_COMMON_TEXT.split())
PUNCTUATION = (",", ".")

SPECIALS = ("<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
END, PAD = SPECIALS[:2]

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('roles are system, user and assistant') }}"
    "{%- endif %}"
    "{%- if message['content'] is string %}{%- set text = message['content'] %}"
    "{%- else %}{%- set text = message['content'] | map(attribute='text') | join(' ') %}"
    "{%- endif %}"
    "{{- '<|' + message['role'] + '|>' + text + '<|end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)

_WORD_MARK = "\u0120"
"""How a byte-level tokenizer spells the space before a word."""


def topic_words() -> list[list[str]]:
    """Words by topic, each word in one topic only."""
    seen: set[str] = set(COMMON)
    lists = []
    for text in TOPICS.values():
        words = [word for word in dict.fromkeys(text.split()) if word not in seen]
        seen.update(words)
        lists.append(words)
    return lists


def sample_text(topic: int, words: int, rng: torch.Generator) -> str:
    """``words`` words of topical prose: each second or third word is a common one."""
    vocabulary = topic_words()[topic]
    text: list[str] = []
    for position in range(words):
        is_common = torch.rand((), generator=rng) < (0.15 if position % 2 else 0.6)
        source = COMMON if is_common else vocabulary
        text.append(source[int(torch.randint(len(source), (), generator=rng))])
        if position % 11 == 10:
            text[-1] += "."
        elif position % 7 == 6:
            text[-1] += ","
    return " ".join(text)


def corpus(seed: int, paragraphs_per_topic: int = 40) -> Iterator[str]:
    """Text to train the tokenizer on; every word occurs."""
    rng = generator(seed, "corpus")
    yield " ".join(COMMON)
    for topic, vocabulary in enumerate(topic_words()):
        yield " ".join(vocabulary)
        for _ in range(paragraphs_per_topic):
            yield sample_text(topic, 40, rng)


def train_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE in which every word of the topics is one token."""
    tokenizer = Tokenizer(models.BPE())
    # Lower case, so that words of ordinary prompts are found at the start of sentences.
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,  # never reached: merging stops when every word is one token
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed), trainer)
    return tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by their part in the text. All values are token ids.

    Attributes:
        size: rows of the embedding; a multiple of 64, the last few may be unused.
        words: topic words, by topic.
        common: words and punctuation that belong to no topic.
        fragments: topic of each piece of a topic word that is no word itself.
        period, end: the full stop, and the token that ends a text.
    """

    size: int
    words: list[list[int]]
    common: list[int]
    fragments: dict[int, int]
    period: int
    end: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, num_topics: int) -> Vocabulary:
        """Sort ``tokenizer``'s tokens; topics beyond ``num_topics`` are folded into them."""
        ids = tokenizer.get_vocab()
        words: list[list[int]] = [[] for _ in range(num_topics)]
        for topic, names in enumerate(topic_words()):
            words[topic % num_topics] += [ids[_WORD_MARK + name] for name in names]
        common = [ids[_WORD_MARK + name] for name in COMMON]
        common += [ids[mark] for mark in PUNCTUATION]
        placed = {*common, *(token for group in words for token in group)}
        fragments = {}
        for piece, token in ids.items():
            if token in placed or len(piece) < 3 or piece in SPECIALS:
                continue
            counts = [
                sum(piece in _WORD_MARK + name for name in names) for names in topic_words()
            ]
            fragments[token] = counts.index(max(counts)) % num_topics
        size = -(-len(ids) // 64) * 64
        return cls(size, words, common, fragments, ids["."], ids[END])


# ---------------------------------------------------------------------------
# Planted structure
# ---------------------------------------------------------------------------


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


def generator(seed: int, name: str) -> torch.Generator:
    """Random numbers for ``name`` alone: tensors do not depend on the order of writing."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _normal(rng: torch.Generator, *shape: int) -> Tensor:
    """Unit normal values in double precision, for planted matrices (small)."""
    return torch.randn(shape, generator=rng, dtype=torch.float64)


class Plant:
    """Directions of the residual stream that carry meaning, all of unit length.

    ``anchor`` [H], ``commonness`` [H] and ``topics`` [K, H] are orthogonal to each other
    and to every row of ``tokens`` [V, H].
    """

    def __init__(self, seed: int, hidden: int, num_topics: int, vocabulary: Vocabulary):
        rng = generator(seed, "plant")
        self.hidden = hidden
        self.vocabulary = vocabulary
        basis = torch.linalg.qr(_normal(rng, hidden, num_topics + 2)).Q.T
        self.anchor, self.commonness, self.topics = basis[0], basis[1], basis[2:]
        tokens = _normal(rng, vocabulary.size, hidden)
        tokens -= tokens @ basis.T @ basis
        self.tokens = tokens / tokens.norm(dim=1, keepdim=True)
        # What attention reads of a word, and where it writes it: two random maps, so that
        # "was said" does not look like "is being said".
        maps = max(hidden, MLA_V_DIM)
        readers = _normal(rng, maps, hidden)
        readers -= readers @ basis.T @ basis
        self.readers = readers / readers.norm(dim=1, keepdim=True)
        self.writers = _normal(rng, hidden, maps) / math.sqrt(hidden)
        self.seed = seed

    def embedding(self) -> Tensor:
        """Input embedding [V, H], rows of root mean square one."""
        rows = GAINS.anchor * self.anchor + GAINS.token * self.tokens
        for topic, words in enumerate(self.vocabulary.words):
            rows[words] += GAINS.topic * self.topics[topic]
        for token, topic in self.vocabulary.fragments.items():
            rows[token] += GAINS.topic * self.topics[topic]
        rows[self.vocabulary.common] += GAINS.topic * self.commonness
        return rows / rows.norm(dim=1, keepdim=True) * math.sqrt(self.hidden)

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
        popularity = GAINS.popularity / GAINS.anchor * _normal(rng, experts, 1)
        preference = GAINS.route_topic / GAINS.topic * _normal(rng, experts, len(self.topics))
        words = GAINS.route_token / GAINS.token * _normal(rng, experts, self.hidden)
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


# ---------------------------------------------------------------------------
# Tensors of a checkpoint
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """One tensor of the checkpoint: its name, its shape and how to make it."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[torch.Generator], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes in bfloat16."""
        return math.prod(self.shape) * BF16_BYTES


def _gaussian(name: str, shape: tuple[int, ...], std: float) -> Weight:
    """A tensor of normal values; made row by row, as it may be as big as a layer."""

    def make(rng: torch.Generator) -> Tensor:
        out = torch.empty(shape, dtype=torch.bfloat16)
        for part in out if out.dim() > 2 else (out,):
            part.copy_(torch.empty(part.shape).normal_(std=std, generator=rng))
        return out

    return Weight(name, shape, make)


@lru_cache(maxsize=1)
def _noise(seed: int, size: int) -> Tensor:
    """[size] unit normal values, made once for a model's experts."""
    return torch.empty(size, dtype=torch.float32).normal_(generator=generator(seed, "noise"))


def _window(name: str, shape: tuple[int, ...], std: float, seed: int) -> Weight:
    """A tensor of normal values cut from a block of twice its size, where its name says.

    Drawing numbers for every tensor takes longer than a fast disk takes to write them.
    """
    size = math.prod(shape)

    def make(rng: torch.Generator) -> Tensor:
        begin = int(torch.randint(size + 1, (), generator=rng))
        return (_noise(seed, 2 * size)[begin : begin + size] * std).reshape(shape)

    return Weight(name, shape, make)


def _constant(name: str, size: int, value: float = 1.0) -> Weight:
    return Weight(name, (size,), lambda rng: torch.full((size,), value))


class Checkpoint:
    """All tensors and the config of one demo model, none of them made yet."""

    def __init__(
        self,
        arch: str,
        shape: Shape,
        seed: int,
        tokenizer: Tokenizer,
        *,
        max_positions: int = MAX_POSITIONS,
        shared_noise: bool = False,
    ):
        self.arch, self.shape, self.seed = arch, shape, seed
        self.max_positions, self.shared_noise = max_positions, shared_noise
        self.traits = ARCHS[arch]
        self.num_topics = min(len(TOPICS), shape.hidden // 4)
        self.vocabulary = Vocabulary.of(tokenizer, self.num_topics)
        self.plant = Plant(seed, shape.hidden, self.num_topics, self.vocabulary)
        self.pad = tokenizer.token_to_id(PAD)

    # -- attention geometry --

    @cached_property
    def head_dim(self) -> int:
        """Width of an attention head; the CPU backend knows 32 and 64."""
        return 64 if self.shape.hidden >= 256 and self.shape.hidden % 64 == 0 else 32

    @cached_property
    def heads(self) -> int:
        """Query heads of a layer."""
        if self.arch == "deepseek_v2":
            return 4 if self.shape.hidden < 1024 else 8
        return self.shape.hidden // self.head_dim

    @cached_property
    def kv_heads(self) -> int:
        """Key and value heads of a layer."""
        if self.arch in ("deepseek_v2", "olmoe"):
            return self.heads
        most = max(1, self.heads // 4)
        return next(n for n in range(most, 0, -1) if self.heads % n == 0)

    @cached_property
    def key_size(self) -> float:
        """Each rotary entry of queries and keys such that scores reach ``GAINS.recency``."""
        is_latent = self.arch == "deepseek_v2"
        rotary = MLA_ROPE_DIM if is_latent else self.head_dim
        scale = math.sqrt(MLA_NOPE_DIM + MLA_ROPE_DIM if is_latent else self.head_dim)
        return math.sqrt(GAINS.recency * scale / rotary)

    @cached_property
    def value_width(self) -> int:
        """Distinct things one attention layer reads of a token."""
        return MLA_V_DIM if self.arch == "deepseek_v2" else self.kv_heads * self.head_dim

    # -- tensors --

    def weights(self) -> Iterator[Weight]:
        """Every tensor, in the order of the model."""
        shape, vocab = self.shape, self.vocabulary.size
        read_words = self.value_width - self.num_topics
        yield Weight(
            "model.embed_tokens.weight",
            (vocab, shape.hidden),
            lambda rng: self.plant.embedding(),
        )
        for layer in range(shape.layers):
            yield from self._layer(layer)
        yield _constant("model.norm.weight", shape.hidden)
        yield Weight(
            "lm_head.weight", (vocab, shape.hidden), lambda rng: self.plant.output(read_words)
        )

    def _layer(self, layer: int) -> Iterator[Weight]:
        prefix = f"model.layers.{layer}"
        yield _constant(f"{prefix}.input_layernorm.weight", self.shape.hidden)
        if self.arch == "deepseek_v2":
            yield from self._latent_attention(f"{prefix}.self_attn")
        else:
            yield from self._attention(f"{prefix}.self_attn")
        yield _constant(f"{prefix}.post_attention_layernorm.weight", self.shape.hidden)
        if layer < self.traits.dense_layers:
            yield from self._dense(f"{prefix}.mlp", self.dense_width)
        else:
            yield from self._moe(f"{prefix}.{self.traits.moe_name}")

    def _attention(self, prefix: str) -> Iterator[Weight]:
        hidden, width, values = self.shape.hidden, self.head_dim, self.kv_heads * self.head_dim
        every = self.heads * width
        with_bias = self.arch == "gpt_oss"
        for name, heads in (("q_proj", self.heads), ("k_proj", self.kv_heads)):
            yield self._look_back(f"{prefix}.{name}.weight", heads, 0, width)
        yield Weight(
            f"{prefix}.v_proj.weight", (values, hidden), lambda rng: self._read(values)
        )
        yield Weight(f"{prefix}.o_proj.weight", (hidden, every), lambda rng: self._write())
        if with_bias:
            sizes = {"q_proj": every, "k_proj": values, "v_proj": values, "o_proj": hidden}
            for name, size in sizes.items():
                yield _gaussian(f"{prefix}.{name}.bias", (size,), 0.02)
            yield _gaussian(f"{prefix}.sinks", (self.heads,), 1.0)
        elif self.arch == "qwen3_moe":
            yield _constant(f"{prefix}.q_norm.weight", width, self.key_size)
            yield _constant(f"{prefix}.k_norm.weight", width, self.key_size)
        elif self.arch == "olmoe":
            yield _constant(f"{prefix}.q_norm.weight", every, self.key_size)
            yield _constant(f"{prefix}.k_norm.weight", values, self.key_size)

    def _latent_attention(self, prefix: str) -> Iterator[Weight]:
        """DeepSeek's attention: keys and values share one latent vector per token."""
        hidden, heads = self.shape.hidden, self.heads
        yield self._look_back(f"{prefix}.q_proj.weight", heads, MLA_NOPE_DIM, MLA_ROPE_DIM)
        yield Weight(
            f"{prefix}.kv_a_proj_with_mqa.weight",
            (MLA_RANK + MLA_ROPE_DIM, hidden),
            self._latent_rows,
        )
        yield _constant(f"{prefix}.kv_a_layernorm.weight", MLA_RANK)
        yield Weight(
            f"{prefix}.kv_b_proj.weight",
            (heads * (MLA_NOPE_DIM + MLA_V_DIM), MLA_RANK),
            self._latent_heads,
        )
        yield Weight(
            f"{prefix}.o_proj.weight", (hidden, heads * MLA_V_DIM), lambda rng: self._write()
        )

    def _latent_rows(self, rng: torch.Generator) -> Tensor:
        """[rank + rope, H]: what is read, filled up with noise; then the shared rotary key."""
        noise = _normal(rng, MLA_RANK, self.shape.hidden) / math.sqrt(self.shape.hidden)
        noise[: self.value_width] = self._read(self.value_width)
        return torch.cat([noise, self._position_rows(rng, 1, 0, MLA_ROPE_DIM)])

    def _latent_heads(self, rng: torch.Generator) -> Tensor:
        """[heads * (nope + v), rank]: per head a faint key, then the values as read."""
        key = 0.2 * _normal(rng, self.heads, MLA_NOPE_DIM, MLA_RANK) / math.sqrt(MLA_RANK)
        value = torch.eye(MLA_V_DIM, MLA_RANK, dtype=torch.float64)
        value = value.expand(self.heads, -1, -1)
        return torch.cat([key, value], dim=1).reshape(-1, MLA_RANK)

    def _look_back(self, name: str, heads: int, plain: int, rotary: int) -> Weight:
        """A query or key projection with ``plain`` then ``rotary`` dimensions a head."""
        return Weight(
            name,
            (heads * (plain + rotary), self.shape.hidden),
            lambda rng: self._position_rows(rng, heads, plain, rotary),
        )

    def _position_rows(
        self, rng: torch.Generator, heads: int, plain: int, rotary: int
    ) -> Tensor:
        """Rows that make queries and keys the same for every token, but for some noise.

        Rotary embedding of a constant vector leaves a score that falls with the distance.
        """
        hidden = self.shape.hidden
        rows = 0.2 * _normal(rng, heads, plain + rotary, hidden)
        rows[:, plain:] += self.key_size / GAINS.anchor * self.plant.anchor
        return rows.reshape(-1, hidden) / math.sqrt(hidden)

    def _read(self, count: int) -> Tensor:
        return self.plant.read_rows(count)

    def _write(self) -> Tensor:
        """[H, heads * head width]: heads with the same values share the writing."""
        columns = self.plant.write_columns(self.value_width, self.shape.layers)
        groups = 1 if self.arch == "deepseek_v2" else self.kv_heads
        sharing = self.heads // groups
        hidden = self.shape.hidden
        per_group = columns.reshape(hidden, groups, 1, -1) / sharing
        return per_group.expand(-1, -1, sharing, -1).reshape(hidden, -1)

    @cached_property
    def dense_width(self) -> int:
        """Width of a DeepSeek model's dense layers."""
        return self.shape.intermediate * (self.shape.top_k + SHARED_EXPERTS)

    def _dense(self, prefix: str, width: int) -> Iterator[Weight]:
        std = GAINS.dense / math.sqrt(self.shape.layers)
        yield from self._network(prefix, width, std, ("gate_proj", "up_proj", "down_proj"))

    def _network(
        self, prefix: str, width: int, rms: float, names: tuple[str, str, str]
    ) -> Iterator[Weight]:
        """A random gated network whose output has root mean square ``rms``."""
        hidden = self.shape.hidden
        gate, up, down = names
        fan_in = 1 / math.sqrt(hidden)
        fan_out = rms / (self.traits.act_rms * math.sqrt(width))
        for name, shape, std in (
            (gate, (width, hidden), fan_in),
            (up, (width, hidden), fan_in),
            (down, (hidden, width), fan_out),
        ):
            if self.shared_noise:
                yield _window(f"{prefix}.{name}.weight", shape, std, self.seed)
            else:
                yield _gaussian(f"{prefix}.{name}.weight", shape, std)

    @cached_property
    def expert_rms(self) -> float:
        """Output of one expert such that all layers together add ``GAINS.experts``."""
        rng = generator(self.seed, "expert_rms")
        spread = math.hypot(GAINS.popularity, GAINS.route_topic, GAINS.route_token)
        scores = spread * _normal(rng, 1000, self.shape.experts)
        chosen = scores.softmax(dim=1).topk(self.shape.top_k, dim=1).values
        if self.traits.renormalize:
            chosen = chosen / chosen.sum(dim=1, keepdim=True)
        moe_layers = self.shape.layers - self.traits.dense_layers
        return GAINS.experts / math.sqrt(moe_layers) / float(chosen.norm(dim=1).mean())

    def _moe(self, prefix: str) -> Iterator[Weight]:
        shape = self.shape
        router = "router" if self.arch == "gpt_oss" else "gate"
        yield Weight(
            f"{prefix}.{router}.weight",
            (shape.experts, shape.hidden),
            lambda rng: self.plant.router(rng, shape.experts),
        )
        if self.arch == "gpt_oss":
            yield _gaussian(f"{prefix}.router.bias", (shape.experts,), 0.2)
            yield from self._fused_experts(f"{prefix}.experts")
            return
        for expert in range(shape.experts):
            yield from self._network(
                f"{prefix}.experts.{expert}",
                shape.intermediate,
                self.expert_rms,
                self.traits.expert_names,
            )
        if self.arch == "deepseek_v2":
            width = SHARED_EXPERTS * shape.intermediate
            yield from self._dense(f"{prefix}.shared_experts", width)

    def _fused_experts(self, prefix: str) -> Iterator[Weight]:
        """gpt-oss keeps a layer's experts in one tensor, gate and up columns interleaved."""
        shape, rms = self.shape, self.expert_rms
        experts, hidden, width = shape.experts, shape.hidden, shape.intermediate
        fan_out = rms / (self.traits.act_rms * math.sqrt(width))
        yield _gaussian(
            f"{prefix}.gate_up_proj", (experts, hidden, 2 * width), 1 / math.sqrt(hidden)
        )
        yield _gaussian(f"{prefix}.gate_up_proj_bias", (experts, 2 * width), 0.2)
        yield _gaussian(f"{prefix}.down_proj", (experts, width, hidden), fan_out)
        yield _gaussian(f"{prefix}.down_proj_bias", (experts, hidden), 0.2 * rms)

    # -- config --

    def config(self) -> dict[str, object]:
        """Contents of config.json."""
        shape = self.shape
        common: dict[str, object] = {
            "architectures": [self.traits.class_name],
            "model_type": self.arch,
            "vocab_size": self.vocabulary.size,
            "hidden_size": shape.hidden,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "num_experts_per_tok": shape.top_k,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": self.max_positions,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": self.vocabulary.end,
            "pad_token_id": self.pad,
            "dtype": "bfloat16",
        }
        return common | self._own_config()

    def _own_config(self) -> dict[str, object]:
        """The part of config.json that only this architecture has."""
        shape = self.shape
        per_arch: dict[str, dict[str, object]] = {
            "mixtral": {
                "head_dim": self.head_dim,
                "intermediate_size": shape.intermediate,
                "num_local_experts": shape.experts,
                "sliding_window": None,
            },
            "qwen3_moe": {
                "head_dim": self.head_dim,
                "intermediate_size": shape.intermediate,
                "moe_intermediate_size": shape.intermediate,
                "num_experts": shape.experts,
                "norm_topk_prob": True,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            },
            "olmoe": {
                "intermediate_size": shape.intermediate,
                "num_experts": shape.experts,
                "norm_topk_prob": False,
                "clip_qkv": None,
            },
            "deepseek_v2": {
                "intermediate_size": self.dense_width,
                "moe_intermediate_size": shape.intermediate,
                "n_routed_experts": shape.experts,
                "n_shared_experts": SHARED_EXPERTS,
                "first_k_dense_replace": self.traits.dense_layers,
                "moe_layer_freq": 1,
                "norm_topk_prob": False,
                "scoring_func": "softmax",
                "topk_method": "greedy",
                "n_group": 1,
                "topk_group": 1,
                "routed_scaling_factor": 1.0,
                "q_lora_rank": None,
                "kv_lora_rank": MLA_RANK,
                "qk_nope_head_dim": MLA_NOPE_DIM,
                "qk_rope_head_dim": MLA_ROPE_DIM,
                "v_head_dim": MLA_V_DIM,
                # With plain rotary embedding vLLM 0.32 rotates latent attention wrongly on
                # CPU in eager mode; this type, which real checkpoints have too, is right.
                "rope_parameters": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
            },
            "gpt_oss": {
                "head_dim": self.head_dim,
                "intermediate_size": shape.intermediate,
                "num_local_experts": shape.experts,
                "attention_bias": True,
                "sliding_window": 128,
                "layer_types": [
                    "full_attention" if layer % 2 else "sliding_attention"
                    for layer in range(shape.layers)
                ],
                "swiglu_limit": 7.0,
                "rope_parameters": _YARN | {"truncate": False},
            },
        }
        return per_arch[self.arch]


# ---------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------


def shards(weights: Sequence[Weight], max_bytes: int) -> list[list[Weight]]:
    """Split ``weights``, in order, into shards of at most ``max_bytes`` each.

    A tensor bigger than that gets a shard of its own.
    """
    groups: list[list[Weight]] = [[]]
    used = 0
    for weight in weights:
        if groups[-1] and used + weight.nbytes > max_bytes:
            groups.append([])
            used = 0
        groups[-1].append(weight)
        used += weight.nbytes
    return groups


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _check_target(out: Path, needed: int, force: bool) -> None:
    """Refuse an ``out`` that is a file, holds files, or has fewer than ``needed`` bytes."""
    if out.exists() and not out.is_dir():
        raise DemoModelError(f"{out} is a file; OUT must be a directory")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise DemoModelError(f"{out} is not empty; choose another directory or pass --force")
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DemoModelError(
            f"{existing} has {free / 1e9:.2f} GB free and the checkpoint needs "
            f"{needed / 1e9:.2f} GB; free some space or ask for less with --experts-gb"
        )


def _clear_checkpoint(out: Path) -> None:
    """Remove an earlier checkpoint's files, config first: a torn rewrite must not load."""
    (out / "config.json").unlink(missing_ok=True)
    for path in (*out.glob("model-*-of-*.safetensors"), out / "model.safetensors.index.json"):
        path.unlink(missing_ok=True)


def _write_tokenizer(out: Path, tokenizer: Tokenizer, max_positions: int) -> None:
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": list(SPECIALS[2:]),
        "clean_up_tokenization_spaces": False,
    }
    _write_json(out / "tokenizer_config.json", settings)
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _write_shards(
    out: Path, weights: Sequence[Weight], seed: int, max_bytes: int, progress: bool
) -> None:
    """Make and write the tensors shard by shard; only one shard is in memory at a time."""
    groups = shards(weights, max_bytes)
    total = sum(weight.nbytes for weight in weights)
    location: dict[str, str] = {}
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="weights", disable=not progress
    ) as bar:
        for number, group in enumerate(groups, start=1):
            file_name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            tensors: dict[str, Tensor] = {}
            for weight in group:
                made = weight.make(generator(seed, weight.name)).to(torch.bfloat16)
                if made.shape != weight.shape:
                    raise AssertionError(f"{weight.name}: {made.shape} != {weight.shape}")
                tensors[weight.name] = made.contiguous()
                location[weight.name] = file_name
                bar.update(weight.nbytes)
            save_file(tensors, out / file_name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": location}
    _write_json(out / "model.safetensors.index.json", index)


def write_demo_model(
    out: Path,
    arch: str,
    *,
    layers: int | None = None,
    experts: int | None = None,
    top_k: int | None = None,
    hidden: int | None = None,
    intermediate: int | None = None,
    experts_gb: float | None = None,
    seed: int = 0,
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    max_positions: int = MAX_POSITIONS,
    shared_noise: bool = False,
    progress: bool = False,
) -> Shape:
    """Write a demo checkpoint to the directory ``out`` and return its shape.

    Sizes left out come from ``experts_gb`` (1e9 bytes of expert weights) or the
    architecture's default. The same arguments give the same bytes.

    With ``shared_noise`` experts are windows of one block of random numbers instead of
    having their own: as different in effect, and written as fast as the disk takes them.
    ``max_positions`` can be changed where positions are rotated plainly.

    Raises:
        DemoModelError: the arguments, ``out`` or the free disk space do not allow it;
            nothing was written.
    """
    if arch not in ARCHS:
        raise DemoModelError(f"arch is {arch!r}; known are {', '.join(ARCHS)}")
    if max_positions != MAX_POSITIONS and arch in ("deepseek_v2", "gpt_oss"):
        raise DemoModelError(
            f"max_positions is {max_positions}; {arch} models are written with {MAX_POSITIONS}"
        )
    if shared_noise and arch == "gpt_oss":
        raise DemoModelError("shared_noise is not possible for gpt_oss: its experts are fused")
    flags = {
        "layers": layers,
        "experts": experts,
        "top_k": top_k,
        "hidden": hidden,
        "intermediate": intermediate,
    }
    shape = resolve_shape(arch, experts_gb, flags)
    tokenizer = train_tokenizer(seed)
    checkpoint = Checkpoint(
        arch, shape, seed, tokenizer, max_positions=max_positions, shared_noise=shared_noise
    )
    weights = list(checkpoint.weights())
    total = sum(weight.nbytes for weight in weights)
    _check_target(out, total + 16_000_000, force)
    out.mkdir(parents=True, exist_ok=True)
    _clear_checkpoint(out)
    _write_tokenizer(out, tokenizer, max_positions)
    _write_shards(out, weights, seed, max_shard_bytes, progress)
    end = {"eos_token_id": checkpoint.vocabulary.end, "pad_token_id": checkpoint.pad}
    _write_json(out / "generation_config.json", {"do_sample": True, **end})
    # Last: a directory without config.json is not a checkpoint.
    _write_json(out / "config.json", checkpoint.config())
    return shape


def build_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = argparse.ArgumentParser(
        description="Write a demo Mixture-of-Experts checkpoint, offline, from a seed."
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to write")
    parser.add_argument("--arch", choices=list(ARCHS), default="mixtral")
    parser.add_argument(
        "--experts-gb",
        type=float,
        metavar="X",
        help="GB (1e9 bytes) of expert weights, met within 10 %% (default: about 0.3)",
    )
    for field in fields(Shape):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=int,
            metavar="N",
            help=f"overrides the size's choice of {field.name.replace('_', '-')}",
        )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument(
        "--force", action="store_true", help="replace a checkpoint that is in OUT"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    started = time.perf_counter()
    try:
        shape = write_demo_model(
            args.out,
            args.arch,
            experts_gb=args.experts_gb,
            seed=args.seed,
            force=args.force,
            progress=sys.stderr.isatty(),
            **{field.name: getattr(args, field.name) for field in fields(Shape)},
        )
    except (DemoModelError, OSError) as error:
        parser.error(str(error))
    sizes = ", ".join(f"{field.name} {getattr(shape, field.name)}" for field in fields(Shape))
    print(
        f"{args.out}: {args.arch}, {sizes}; "
        f"{expert_bytes(args.arch, shape) / 1e9:.3f} GB of experts, "
        f"written in {time.perf_counter() - started:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
