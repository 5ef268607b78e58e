"""The demo checkpoint is complete, reproducible, of the size asked for, and behaves.

Run as a program (``python test_make_demo_model.py CHECKPOINT``) this file serves a
checkpoint with vLLM and prints what it observed as JSON; the tests marked ``vllm`` do that
in a process of their own, because an engine in the test process would outlive its test.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from itertools import combinations, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts import make_demo_model as demo  # noqa: E402

ARCHS = list(demo.ARCHS)
TINY = {"layers": 2, "experts": 4, "top_k": 2, "hidden": 64, "intermediate": 32}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of every architecture."""
    base = tmp_path_factory.mktemp("tiny")
    for arch in ARCHS:
        demo.write_demo_model(base / arch, arch, **TINY)
    return {arch: base / arch for arch in ARCHS}


def tensors_of(model: Path) -> dict[str, torch.Tensor]:
    """All tensors in the shards of ``model``."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return found


def digests(model: Path) -> dict[str, str]:
    """Hash of every file of ``model``, by name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in model.iterdir()
    }


def experts_of(tensors: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """Tensors of the routed experts: what they are -> one tensor for each expert."""
    groups: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors.items():
        prefix, marker, rest = name.partition(".experts.")
        if not marker:
            continue
        expert, _, kind = rest.partition(".")
        if expert.isdigit():
            groups.setdefault(f"{prefix}.{kind}", []).append(tensor)
        else:
            groups[name] = list(tensor)
    return groups


# ---------------------------------------------------------------------------
# What is written
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_index_names_every_tensor(tiny: dict[str, Path], arch: str) -> None:
    tensors = tensors_of(tiny[arch])
    index = json.loads((tiny[arch] / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert all(t.isfinite().all() for t in tensors.values())


@pytest.mark.parametrize("arch", ARCHS)
def test_transformers_loads_it_completely(tiny: dict[str, Path], arch: str) -> None:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        tiny[arch], dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values()), info
    assert model.config.model_type == arch
    logits = model(torch.arange(20).unsqueeze(0)).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize("arch", ARCHS)
def test_every_expert_tensor_differs(tiny: dict[str, Path], arch: str) -> None:
    groups = experts_of(tensors_of(tiny[arch]))
    kinds = {name.rsplit(".", 2 if name.endswith("weight") else 1)[-1] for name in groups}
    moe_layers = TINY["layers"] - demo.ARCHS[arch].dense_layers
    assert len(groups) == moe_layers * (4 if arch == "gpt_oss" else 3), kinds
    for name, experts in groups.items():
        assert len(experts) == TINY["experts"], name
        for one, other in combinations(experts, 2):
            # Not merely unequal: hardly any element may agree.
            assert (one == other).float().mean() < 0.1, name
    flat = [expert for experts in groups.values() for expert in experts]
    assert all(expert.float().std() > 0 for expert in flat)


@pytest.mark.parametrize("arch", ARCHS)
def test_layers_have_routers_of_their_own(arch: str, tmp_path: Path) -> None:
    demo.write_demo_model(tmp_path, arch, **TINY | {"layers": 3})
    routers = [
        tensor
        for name, tensor in tensors_of(tmp_path).items()
        if name.endswith((".gate.weight", ".router.weight"))
    ]
    assert len(routers) == 3 - demo.ARCHS[arch].dense_layers
    assert not torch.equal(routers[0], routers[1])


def test_tokenizer_and_chat_template(tiny: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    model = tiny["mixtral"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    for words in demo.topic_words():
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
    lists = demo.topic_words()
    words = [word for words in lists for word in words]
    assert len(words) == len(set(words))
    assert min(len(words) for words in lists) >= 20


# ---------------------------------------------------------------------------
# Reproducibility
# ---------------------------------------------------------------------------


def test_experts_cut_from_one_block_of_noise_differ(tmp_path: Path) -> None:
    for name in ("one", "other"):
        demo.write_demo_model(tmp_path / name, "mixtral", **TINY, shared_noise=True)
    assert digests(tmp_path / "one") == digests(tmp_path / "other")
    plain = tmp_path / "plain"
    demo.write_demo_model(plain, "mixtral", **TINY)
    own, cut = tensors_of(plain), tensors_of(tmp_path / "one")
    assert own.keys() == cut.keys()
    for name, tensor in cut.items():
        if ".experts." in name:
            ratio = float(tensor.float().std() / own[name].float().std())
            assert ratio == pytest.approx(1.0, abs=0.1), name
        else:
            assert torch.equal(tensor, own[name]), name
    for tensors in experts_of(cut).values():
        assert all(not torch.equal(one, other) for one, other in combinations(tensors, 2))


def test_longer_positions_only_where_they_rotate_plainly(tmp_path: Path) -> None:
    demo.write_demo_model(tmp_path / "long", "qwen3_moe", **TINY, max_positions=40960)
    config = json.loads((tmp_path / "long" / "config.json").read_text())
    assert config["max_position_embeddings"] == 40960
    with pytest.raises(demo.DemoModelError, match="max_positions is 40960"):
        demo.write_demo_model(tmp_path / "no", "gpt_oss", **TINY, max_positions=40960)


def test_fused_experts_have_noise_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(demo.DemoModelError, match="shared_noise"):
        demo.write_demo_model(tmp_path / "no", "gpt_oss", **TINY, shared_noise=True)


@pytest.mark.parametrize("arch", ARCHS)
def test_same_seed_same_bytes(tiny: dict[str, Path], arch: str, tmp_path: Path) -> None:
    # Another process, with another hash seed and other threads, through the command line.
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    subprocess.run(
        [
            sys.executable,
            ROOT / "scripts/make_demo_model.py",
            tmp_path / "m",
            "--arch",
            arch,
            *flags,
        ],
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"},
    )
    assert digests(tmp_path / "m") == digests(tiny[arch])


def test_other_seed_other_weights(tiny: dict[str, Path], tmp_path: Path) -> None:
    demo.write_demo_model(tmp_path, "gpt_oss", seed=1, **TINY)
    mine, theirs = tensors_of(tmp_path), tensors_of(tiny["gpt_oss"])
    constant = {name for name in mine if name.endswith("norm.weight")}
    assert not [name for name in set(mine) - constant if torch.equal(mine[name], theirs[name])]


def test_sharding_does_not_change_the_weights(tiny: dict[str, Path], tmp_path: Path) -> None:
    demo.write_demo_model(tmp_path, "mixtral", max_shard_bytes=100_000, **TINY)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[-1].name == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"
    for path in shards:
        with safe_open(path, framework="pt") as shard:
            names = list(shard.keys())
            size = sum(shard.get_tensor(name).nbytes for name in names)
        assert size <= 100_000 or len(names) == 1
    mine, theirs = tensors_of(tmp_path), tensors_of(tiny["mixtral"])
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


# ---------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("gigabytes", [0.02, 0.3, 1.0, 6.0, 40.0])
@pytest.mark.parametrize("arch", ARCHS)
def test_size_is_met(arch: str, gigabytes: float) -> None:
    shape = demo.resolve_shape(arch, gigabytes, {})
    assert demo.expert_bytes(arch, shape) / 1e9 == pytest.approx(gigabytes, rel=0.1)
    assert shape.top_k == demo.ARCHS[arch].default.top_k


@pytest.mark.parametrize("arch", ARCHS)
def test_written_experts_have_the_size(arch: str, tmp_path: Path) -> None:
    shape = demo.write_demo_model(tmp_path, arch, experts_gb=0.02)
    experts = experts_of(tensors_of(tmp_path))
    written = sum(tensor.nbytes for group in experts.values() for tensor in group)
    assert written == demo.expert_bytes(arch, shape)
    assert written / 1e9 == pytest.approx(0.02, rel=0.1)


def test_explicit_sizes_win() -> None:
    flags = {"layers": 12, "experts": 16, "top_k": 2, "hidden": 1024, "intermediate": 2048}
    assert demo.resolve_shape("mixtral", None, flags) == demo.Shape(**flags)
    shape = demo.resolve_shape("qwen3_moe", 2.0, {"layers": 5, "hidden": 1024})
    assert (shape.layers, shape.hidden) == (5, 1024)
    assert demo.expert_bytes("qwen3_moe", shape) / 1e9 == pytest.approx(2.0, rel=0.1)
    assert demo.resolve_shape("qwen3_moe", None, {"experts": 4}).top_k == 4


@pytest.mark.slow
def test_memory_is_bounded_by_a_shard(tmp_path: Path) -> None:
    program = (
        "import resource, sys; from pathlib import Path\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from scripts.make_demo_model import write_demo_model\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        f"write_demo_model(Path({str(tmp_path / 'small')!r}), 'gpt_oss', experts_gb=0.02)\n"
        "before = peak()\n"
        f"write_demo_model(Path({str(tmp_path / 'big')!r}), 'gpt_oss', experts_gb=1.0,"
        " max_shard_bytes=50_000_000)\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) < 300_000_000


# ---------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--hidden", "100"], ["hidden is 100", "multiple of 32"]),
        (["--intermediate", "33"], ["intermediate is 33", "multiple of 32"]),
        (["--hidden", "0"], ["hidden is 0", "multiple of 32"]),
        (["--layers", "0"], ["layers is 0", "at least 1"]),
        (["--arch", "deepseek_v2", "--layers", "1"], ["layers is 1", "at least 2"]),
        (["--experts", "1"], ["experts is 1", "at least 2"]),
        (["--top-k", "17"], ["top-k is 17", "between 1 and experts (16)"]),
        (["--top-k", "0"], ["top-k is 0", "between 1"]),
        (["--experts-gb", "-1"], ["experts-gb is -1", "positive"]),
        (["--experts-gb", "nan"], ["experts-gb is nan", "positive"]),
        (["--experts-gb", "1e9"], ["experts-gb is 1e+09", "the nearest has"]),
        (["--experts-gb", "1", "--hidden", "100"], ["hidden is 100", "multiple of 32"]),
        (["--arch", "llama"], ["llama", "mixtral", "gpt_oss"]),
        (["--layers", "two"], ["--layers", "two"]),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    with pytest.raises(SystemExit) as stop:
        demo.main([str(out), *arguments])
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert all(part in message for part in parts), message
    assert not out.exists()


def test_fixed_sizes_that_cannot_reach_the_size(tmp_path: Path) -> None:
    fixed = TINY | {"experts_gb": 5.0}
    with pytest.raises(
        demo.DemoModelError, match=r"experts-gb is 5; with layers=2, .* has .* GB"
    ):
        demo.write_demo_model(tmp_path, "mixtral", **fixed)


def test_occupied_target_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(demo.DemoModelError, match=r"is not empty.*--force"):
        demo.write_demo_model(tmp_path, "mixtral", **TINY)
    with pytest.raises(demo.DemoModelError, match="is a file; OUT must be a directory"):
        demo.write_demo_model(tmp_path / "notes.txt", "mixtral", **TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_force_replaces_a_checkpoint_only(tiny: dict[str, Path], tmp_path: Path) -> None:
    demo.write_demo_model(tmp_path, "olmoe", max_shard_bytes=100_000, **TINY)
    (tmp_path / "notes.txt").write_text("mine")
    demo.write_demo_model(tmp_path, "mixtral", force=True, **TINY)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "notes.txt").unlink()
    assert digests(tmp_path) == digests(tiny["mixtral"])


def test_torn_rewrite_leaves_nothing_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk gone")

    demo.write_demo_model(tmp_path, "mixtral", **TINY)
    monkeypatch.setattr(demo, "save_file", fail)
    with pytest.raises(OSError, match="disk gone"):
        demo.write_demo_model(tmp_path, "mixtral", force=True, **TINY)
    assert not (tmp_path / "config.json").exists()


def test_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(total=10**9, used=10**9, free=10**6)
    monkeypatch.setattr(demo.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(demo.DemoModelError, match=r"has 0.00 GB free .* needs 0.0\d GB"):
        demo.write_demo_model(tmp_path / "model", "mixtral", **TINY)
    assert not (tmp_path / "model").exists()


# ---------------------------------------------------------------------------
# Behaviour in vLLM
# ---------------------------------------------------------------------------


@pytest.fixture(scope="module", params=ARCHS)
def observed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What :func:`observe` reports of a default-sized checkpoint."""
    model = tmp_path_factory.mktemp("served") / request.param
    demo.write_demo_model(model, request.param)
    done = subprocess.run(
        [sys.executable, __file__, model], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(request.param, {k: v for k, v in report.items() if k != "texts"})
    return report


@pytest.mark.vllm
def test_served_model_routes_like_real_ones(observed: dict[str, Any]) -> None:
    """The ranges are those of real models (gpt-oss, OLMoE, Mixtral, DeepSeek-V2-Lite)."""
    assert 0.27 <= observed["reuse"] <= 0.52
    assert observed["reuse"] > observed["reuse_far"]
    assert 0.5 <= observed["lru_hit_rate"] <= 0.78
    # All requests together need far more experts than one alone.
    assert observed["own_share"] > observed["common_share"] + 0.03


@pytest.mark.vllm
def test_served_model_computes_what_transformers_computes(observed: dict[str, Any]) -> None:
    assert observed["transformers_difference"] < 0.1


@pytest.mark.vllm
def test_wrong_expert_shows_in_logprobs(observed: dict[str, Any]) -> None:
    assert observed["repeated_difference"] == 0
    assert min(observed["wrong_expert_difference"]) > 0.03


@pytest.mark.vllm
def test_served_text_does_not_collapse(observed: dict[str, Any]) -> None:
    assert observed["repeats"] < 0.1
    assert observed["greedy_distinct"] >= 4


def lru_hit_rate(requests: list[torch.Tensor], slots: int) -> float:
    """Hit rate of an LRU of ``slots`` experts per layer, one request after the other.

    Args:
        requests: expert ids ``[tokens, layers, k]`` of each.
    """
    hits = needs = 0
    for layer in range(requests[0].shape[1]):
        resident: list[int] = []
        for step in torch.cat(requests)[:, layer].tolist():
            hits += sum(expert in resident for expert in step)
            needs += len(step)
            resident = [expert for expert in resident if expert not in step] + step
            resident = resident[-slots:]
    return hits / needs


def reuse(requests: list[torch.Tensor], lag: int) -> float:
    """Share of a token's experts that the token ``lag`` before used in the same layer."""
    shares = [
        (ids[lag:, :, :, None] == ids[:-lag, :, None, :]).any(-1).float().mean()
        for ids in requests
    ]
    return float(torch.stack(shares).mean())


def top_share(requests: list[torch.Tensor], experts: int) -> float:
    """Share of all uses that falls on the most used quarter of each layer's experts."""
    ids = torch.cat(requests)
    shares = []
    for layer in range(ids.shape[1]):
        counts = (
            ids[:, layer].flatten().bincount(minlength=experts).sort(descending=True).values
        )
        shares.append(counts[: experts // 4].sum() / counts.sum())
    return float(torch.stack(shares).mean())


def observe(model: str, requests: int = 8, tokens: int = 64) -> dict[str, Any]:
    """Serve ``model`` and report its routing (single-token decode), logprobs and texts."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    routed: list[tuple[str, torch.Tensor]] = []
    misrouted = ""
    forward = RoutedExperts.forward_modular

    def spy(
        self: Any, x: Any, topk_weights: Any, topk_ids: Any, *rest: Any, **more: Any
    ) -> Any:
        if self.layer_name == misrouted:
            topk_ids = (topk_ids + 1) % self.global_num_experts
        routed.append((self.layer_name, topk_ids.clone()))
        return forward(self, x, topk_weights, topk_ids, *rest, **more)

    RoutedExperts.forward_modular = spy
    llm = LLM(model=model, enforce_eager=True, max_model_len=512, max_num_seqs=1, seed=0)

    def generate(prompt: str, **options: Any) -> Any:
        routed.clear()
        return llm.generate([prompt], SamplingParams(**options), use_tqdm=False)[0]

    def prompt_logprobs(prompt: str) -> torch.Tensor:
        out = generate(prompt, max_tokens=1, prompt_logprobs=0)
        pairs = zip(out.prompt_logprobs[1:], out.prompt_token_ids[1:], strict=True)
        return torch.tensor([chosen[token].logprob for chosen, token in pairs])

    # Topical prose, then the start of ordinary requests, which mix topics.
    prompts = [
        demo.sample_text(topic, 30, demo.generator(1, str(topic))) for topic in range(requests)
    ]
    prompts[1::4] = ["Explain how a compiler works to a student."] * len(prompts[1::4])
    ids, texts, repeats = [], [], []
    for number, prompt in enumerate(prompts):
        out = generate(prompt, max_tokens=tokens, ignore_eos=True, temperature=1.0, seed=number)
        names = list(dict.fromkeys(name for name, _ in routed))
        decode = {
            name: [row for n, row in routed if n == name and len(row) == 1] for name in names
        }
        ids.append(torch.stack([torch.cat(rows) for rows in decode.values()], dim=1).long())
        said = out.outputs[0].token_ids
        repeats.append(sum(a == b for a, b in pairwise(said)) / len(said))
        texts.append(out.outputs[0].text)
    greedy = generate(prompts[0], max_tokens=tokens, ignore_eos=True, temperature=0.0)

    expected = prompt_logprobs(prompts[0])
    again = prompt_logprobs(prompts[0])
    wrong = []
    for misrouted in (names[0], names[len(names) // 2], names[-1]):  # noqa: B007
        wrong.append(float((prompt_logprobs(prompts[0]) - expected).abs().mean()))
    misrouted = ""

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    spoken = torch.tensor([greedy.prompt_token_ids])
    with torch.no_grad():
        logprobs = reference(spoken).logits[0, :-1].float().log_softmax(-1)
    theirs = logprobs.gather(1, spoken[0, 1:, None])[:, 0]
    experts = reference.config.num_experts
    return {
        "reuse": reuse(ids, 1),
        "reuse_far": reuse(ids, 32),
        "lru_hit_rate": lru_hit_rate(ids, experts // 4),
        "own_share": sum(top_share([one], experts) for one in ids) / len(ids),
        "common_share": top_share(ids, experts),
        "repeats": sum(repeats) / len(repeats),
        "greedy_distinct": len(set(greedy.outputs[0].token_ids)),
        "repeated_difference": float((again - expected).abs().max()),
        "wrong_expert_difference": wrong,
        "transformers_difference": float((theirs - expected).abs().mean()),
        "texts": [*texts, greedy.outputs[0].text],
    }


if __name__ == "__main__":
    print(json.dumps(observe(sys.argv[1])))
