"""Every word of a topic is one token, and belongs to one topic."""

from __future__ import annotations

import json
from pathlib import Path

from scripts.demo_model.text import topic_words


def test_tokenizer_and_chat_template(tiny: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    model = tiny["mixtral"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    for words in topic_words():
        for word in words:
            assert len(tokenizer(word)["input_ids"]) == 1, word
    text = "the ship, and Caf\u00e9 \u4f60\u597d \U0001f642!"
    assert tokenizer.decode(tokenizer(text)["input_ids"]).strip() == text.lower()
    assert len(tokenizer) <= config["vocab_size"]
    assert tokenizer.eos_token_id == config["eos_token_id"]
    assert tokenizer.pad_token_id == config["pad_token_id"]
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|system|>be brief<|end|><|user|>hello<|end|><|assistant|>"
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    prompt = tokenizer.apply_chat_template(parts, tokenize=False)
    assert prompt == "<|user|>hello<|end|>"
    markers = tokenizer("<|user|><|assistant|>", add_special_tokens=False)["input_ids"]
    assert len(markers) == 2


def test_words_belong_to_one_topic() -> None:
    lists = topic_words()
    words = [word for words in lists for word in words]
    assert len(words) == len(set(words))
    assert min(len(words) for words in lists) >= 20
