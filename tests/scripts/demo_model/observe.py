"""Serves a checkpoint with vLLM and prints what it observed as JSON.

    python -m tests.scripts.demo_model.observe CHECKPOINT

A process of its own, because an engine in the test process would outlive its test.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import pairwise
from typing import Any

import torch

from scripts.demo_model.seeded import generator
from scripts.demo_model.text import sample_text


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


class SpiedEngine:
    """A vLLM engine whose routing is written down and can be made wrong."""

    def __init__(self, model: str) -> None:
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
        from vllm import LLM
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

        self.routed: list[tuple[str, torch.Tensor]] = []
        self.misrouted = ""
        engine, forward = self, RoutedExperts.forward_modular

        def spy(
            self: Any, x: Any, topk_weights: Any, topk_ids: Any, *rest: Any, **more: Any
        ) -> Any:
            if self.layer_name == engine.misrouted:
                topk_ids = (topk_ids + 1) % self.global_num_experts
            engine.routed.append((self.layer_name, topk_ids.clone()))
            return forward(self, x, topk_weights, topk_ids, *rest, **more)

        RoutedExperts.forward_modular = spy
        self.llm = LLM(
            model=model, enforce_eager=True, max_model_len=512, max_num_seqs=1, seed=0
        )

    def generate(self, prompt: str, **options: Any) -> Any:
        """One request's output; its routing alone is in ``routed`` afterwards."""
        from vllm import SamplingParams

        self.routed.clear()
        return self.llm.generate([prompt], SamplingParams(**options), use_tqdm=False)[0]

    @property
    def layers(self) -> list[str]:
        """Layers with experts, in the order of the model."""
        return list(dict.fromkeys(name for name, _ in self.routed))

    def decode_ids(self) -> torch.Tensor:
        """Expert ids ``[tokens, layers, k]`` of the last request's single-token steps."""
        rows = [
            torch.cat([ids for name, ids in self.routed if name == layer and len(ids) == 1])
            for layer in self.layers
        ]
        return torch.stack(rows, dim=1).long()

    def prompt_logprobs(self, prompt: str) -> torch.Tensor:
        """Log-probability of every token of the prompt but the first."""
        out = self.generate(prompt, max_tokens=1, prompt_logprobs=0)
        pairs = zip(out.prompt_logprobs[1:], out.prompt_token_ids[1:], strict=True)
        return torch.tensor([chosen[token].logprob for chosen, token in pairs])

    def wrong_expert_differences(self, prompt: str, expected: torch.Tensor) -> list[float]:
        """What wrong experts in the first, the middle and the last layer change."""
        layers, differences = self.layers, []
        for self.misrouted in (layers[0], layers[len(layers) // 2], layers[-1]):
            differences.append(float((self.prompt_logprobs(prompt) - expected).abs().mean()))
        self.misrouted = ""
        return differences


def prompts_of(requests: int) -> list[str]:
    """Topical prose; at every fourth place the start of an ordinary request."""
    prompts = [sample_text(topic, 30, generator(1, str(topic))) for topic in range(requests)]
    # Ordinary requests mix topics.
    prompts[1::4] = ["Explain how a compiler works to a student."] * len(prompts[1::4])
    return prompts


def reference_logprobs(reference: Any, tokens: list[int]) -> torch.Tensor:
    """What a model of transformers says of ``tokens``, all but the first."""
    spoken = torch.tensor([tokens])
    with torch.no_grad():
        logprobs = reference(spoken).logits[0, :-1].float().log_softmax(-1)
    return logprobs.gather(1, spoken[0, 1:, None])[:, 0]


def observe(model: str, requests: int = 8, tokens: int = 64) -> dict[str, Any]:
    """Serve ``model`` and report its routing (single-token decode), logprobs and texts."""
    from transformers import AutoModelForCausalLM

    engine, prompts = SpiedEngine(model), prompts_of(requests)
    ids, texts, repeats = [], [], []
    for number, prompt in enumerate(prompts):
        out = engine.generate(
            prompt, max_tokens=tokens, ignore_eos=True, temperature=1.0, seed=number
        )
        ids.append(engine.decode_ids())
        said = out.outputs[0].token_ids
        repeats.append(sum(a == b for a, b in pairwise(said)) / len(said))
        texts.append(out.outputs[0].text)
    greedy = engine.generate(prompts[0], max_tokens=tokens, ignore_eos=True, temperature=0.0)
    expected = engine.prompt_logprobs(prompts[0])
    again = engine.prompt_logprobs(prompts[0])
    wrong = engine.wrong_expert_differences(prompts[0], expected)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    theirs = reference_logprobs(reference, greedy.prompt_token_ids)
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
