"""The upcycled model computes what the dense one does, and routes by what it sees."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from scripts.demo_model import DemoModelError
from scripts.demo_model.text import corpus
from scripts.demo_model.tokenizer import CHAT_TEMPLATE, END, PAD, train_tokenizer
from scripts.upcycle import Choices, DenseModel, UpcycleError, upcycle
from scripts.upcycle.__main__ import main
from scripts.upcycle.dense import PACKAGES, write_dense
from scripts.upcycle.observe import SINK_TOKENS, WINDOW, inputs_of_networks, windows
from scripts.upcycle.prompts import SUBJECTS, prompts
from scripts.upcycle.routers import router_of, spherical_kmeans

SMALL = Choices(experts=4, top_k=2, noise=0.0, tokens=1024)


@pytest.fixture(scope="module")
def dense() -> DenseModel:
    """A Llama of two layers with random weights, and the demo models' tokenizer."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(0),
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
    )
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and "embed" not in name:
            torch.nn.init.normal_(weight, std=0.15)
        # What bfloat16 holds exactly, so that both models have the same numbers.
        weight.data = weight.data.bfloat16().float()
    return DenseModel(model, tokenizer)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [" ".join(corpus(seed)) for seed in (0, 1)]


@pytest.fixture(scope="module")
def ids(dense: DenseModel, texts: list[str]) -> torch.Tensor:
    return windows(dense, texts, SMALL.tokens)


def loaded(out: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


@torch.inference_mode()
def test_without_noise_it_computes_what_the_dense_model_does(
    dense: DenseModel, texts: list[str], ids: torch.Tensor, tmp_path: Path
) -> None:
    upcycle(dense, tmp_path, SMALL, texts=texts)
    model = loaded(tmp_path)
    assert type(model).__name__ == "MixtralForCausalLM"
    expected, found = dense.model(ids[:1]).logits, model(ids[:1]).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "the river"}]
    assert tokenizer.apply_chat_template(
        messages, tokenize=False
    ) == dense.tokenizer.apply_chat_template(messages, tokenize=False)


@torch.inference_mode()
def test_the_dense_model_is_written_as_it_is(
    dense: DenseModel, ids: torch.Tensor, tmp_path: Path
) -> None:
    write_dense(dense, tmp_path)
    model = loaded(tmp_path)
    assert type(model) is type(dense.model)
    torch.testing.assert_close(
        model(ids[:1]).logits, dense.model(ids[:1]).logits, rtol=5e-2, atol=5e-2
    )
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(dense.tokenizer)


def test_noise_makes_every_expert_another(
    dense: DenseModel, texts: list[str], tmp_path: Path
) -> None:
    noisy = Choices(experts=4, top_k=1, noise=0.1, tokens=1024)
    upcycle(dense, tmp_path, noisy, texts=texts)
    experts = [
        parameter
        for name, parameter in loaded(tmp_path).named_parameters()
        if "layers.1.mlp.experts.down_proj" in name
    ]
    (stacked,) = experts
    theirs = dense.model.model.layers[1].mlp.down_proj.weight
    for expert in stacked:
        apart = (expert - theirs).detach().std() / theirs.detach().std()
        assert 0.08 < float(apart) < 0.12
    assert len({float(expert.detach().sum()) for expert in stacked}) == 4


@torch.inference_mode()
def test_every_expert_is_used_and_none_by_all(
    dense: DenseModel, texts: list[str], ids: torch.Tensor, tmp_path: Path
) -> None:
    upcycle(dense, tmp_path, SMALL, texts=texts)
    logits = loaded(tmp_path)(ids, output_router_logits=True).router_logits
    for layer in logits:
        share = torch.bincount(layer.topk(2).indices.reshape(-1), minlength=4) / layer.shape[0]
        assert float(share.min()) > 0.02
        assert float(share.max()) < 0.98


def test_first_tokens_of_a_window_are_not_seen(dense: DenseModel, ids: torch.Tensor) -> None:
    seen = inputs_of_networks(dense, ids)
    assert [tuple(part.shape) for part in seen] == [
        (len(ids) * (WINDOW - SINK_TOKENS), 64) for _ in range(2)
    ]
    assert not any(layer.mlp._forward_pre_hooks for layer in dense.model.model.layers)


def test_kmeans_finds_planted_directions() -> None:
    rng = torch.Generator().manual_seed(3)
    planted = torch.eye(8, 32)
    samples = planted.repeat(50, 1) + 0.1 * torch.randn(400, 32, generator=rng)
    samples = torch.nn.functional.normalize(samples, dim=1)
    centres = spherical_kmeans(samples, 8, rng)
    # Local optima may give two centres to one direction; most are found.
    assert int(((planted @ centres.T).max(dim=1).values > 0.9).sum()) >= 6


def test_a_centre_that_serves_nobody_moves() -> None:
    rng = torch.Generator().manual_seed(0)
    samples = torch.cat([torch.eye(2, 4)[:1].repeat(99, 1), torch.eye(2, 4)[1:]])
    centres = spherical_kmeans(samples, 2, rng)
    torch.testing.assert_close((samples @ centres.T).max(dim=1).values, torch.ones(100))


def test_routers_ignore_the_mean() -> None:
    rng = torch.Generator().manual_seed(1)
    inputs = torch.randn(500, 16, generator=rng) + 5.0
    router = router_of(inputs, 4, 8.0, rng)
    mean = inputs.mean(dim=0)
    assert float((router @ mean).abs().max()) < 1e-3 * float(mean.norm())
    # The logit of the best expert is about the scale at most.
    assert 1.0 < float((inputs @ router.T).max(dim=1).values.median()) < 8.0


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        (Choices(experts=1), "experts is 1"),
        (Choices(top_k=17), "top-k is 17"),
        (Choices(noise=-1.0), "noise is -1"),
        (Choices(scale=0.0), "scale is 0"),
        (Choices(tokens=10), "tokens is 10"),
        (Choices(tokens=10**7), "tokens is 10000000"),
    ],
)
def test_impossible_choices_are_refused(
    dense: DenseModel, texts: list[str], choices: Choices, says: str, tmp_path: Path
) -> None:
    with pytest.raises(UpcycleError, match=says):
        upcycle(dense, tmp_path / "model", choices, texts=texts)
    assert not (tmp_path / "model").exists()


def test_occupied_target_is_refused(
    dense: DenseModel, texts: list[str], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DemoModelError, match=r"is not empty.*--force"):
        upcycle(dense, tmp_path, SMALL, texts=texts)
    upcycle(dense, tmp_path, SMALL, texts=texts, force=True)
    assert json.loads((tmp_path / "config.json").read_text())["num_local_experts"] == 4


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named_with_its_remedy(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda wanted: None if wanted == name else find("json")
    )
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path / "model")])
    message = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert f"{name} is not installed" in message
    assert "pip install --no-deps -r requirements/upcycle.lock" in message


def test_there_are_forty_prompts_and_neighbours_differ() -> None:
    questions = prompts()
    assert len(questions) == len(set(questions)) == 40
    subject_of = {text: subject for subject, texts in SUBJECTS.items() for text in texts}
    subjects = [subject_of[question] for question in questions]
    assert all(a != b for a, b in itertools.pairwise(subjects))
