"""The tokenizer, its chat template, and which token plays which part in the text."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from scripts.demo_model.text import COMMON, PUNCTUATION, corpus, topic_words

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
