"""One contestant of bench_prefetch.py: an engine that answers rounds of prompts.

    python scripts/prefetch_contestant.py ARGUMENTS_AS_JSON

A round per line on stdin (its seed), its figures as JSON on stdout.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.harness.completions import prompts  # noqa: E402
from scripts.harness.engine import take_stdout  # noqa: E402
from scripts.harness.foretold import Foretold  # noqa: E402
from vllm_moe_offload.cache.planner import COUNTER_NAMES  # noqa: E402

ROUTING = "routing.npz"
KV_CACHE_BYTES = 256 << 20


class Oracle(Foretold):
    """Predicts what a record says."""

    depth = 4

    def __init__(self) -> None:
        self.steps: list[list[np.ndarray]] = []
        self._step = -1
        self.wrong = 0

    def learn(self, path: Path) -> None:
        """Routing of the coming round: per step and layer ids ``[rows, top_k]``."""
        with np.load(path) as record:
            num_steps, num_layers = (int(size) for size in record["shape"])
            self.steps = [
                [record[f"{step}.{layer}"] for layer in range(num_layers)]
                for step in range(num_steps)
            ]
        self._step = -1

    def begin_step(self, rows: Any) -> None:
        self._step += 1

    def observe(self, layer: int, ids: np.ndarray) -> None:
        self.wrong += not np.array_equal(ids, self.steps[self._step][layer])

    def told(self, layer: int, ahead: int) -> list[tuple[int, float]] | None:
        step, target = divmod(
            self._step * len(self.steps[0]) + layer + ahead, len(self.steps[0])
        )
        if step >= len(self.steps):
            return None
        return [(expert, 1.0) for expert in np.unique(self.steps[step][target]).tolist()]


class Recorder:
    """Writes down the routing that a runtime sees."""

    def __init__(self, runtime: Any) -> None:
        self.steps: list[list[np.ndarray]] = []
        begin, begin_layer = runtime.begin_step, runtime.begin_layer

        def begin_step(rows: Any) -> None:
            self.steps.append([])
            begin(rows)

        def record(layer: int, topk_ids: Any, hidden: Any = None) -> Any:
            if runtime.num_step_tokens is not None:
                self.steps[-1].append(topk_ids[: runtime.num_step_tokens].numpy().copy())
            return begin_layer(layer, topk_ids, hidden)

        runtime.begin_step, runtime.begin_layer = begin_step, record

    def save(self, path: Path) -> None:
        """Writes the round and forgets it."""
        arrays: dict[str, Any] = {
            f"{step}.{layer}": ids
            for step, layers in enumerate(self.steps)
            for layer, ids in enumerate(layers)
        }
        np.savez(path, shape=np.array([len(self.steps), len(self.steps[0])]), **arrays)
        self.steps = []


class Contestant:
    """An engine, and what this contestant does differently."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        from vllm_moe_offload.integration.experts import find_runtime
        from vllm_moe_offload.runtime import OffloadRuntime

        self.arguments = arguments
        self.llm = LLM(
            arguments["model"],
            additional_config={"moe_offload": arguments["options"]},
            max_model_len=1024,
            max_num_seqs=arguments["concurrency"],
            kv_cache_memory_bytes=KV_CACHE_BYTES,
            enable_prefix_caching=False,
            enforce_eager=True,
            disable_log_stats=True,
        )
        executor: Any = self.llm.llm_engine.model_executor
        runtime = find_runtime(executor.driver_worker.worker.model_runner.get_model())
        if not isinstance(runtime, OffloadRuntime):
            raise RuntimeError(f"{arguments['name']}: no experts of the model are offloaded")
        self.runtime = runtime
        self.oracle: Oracle | None = None
        if arguments["name"] == "oracle":
            self.oracle = Oracle()
            if runtime.prefetcher is None:
                raise RuntimeError("oracle: this engine does not prefetch")
            runtime.prefetcher.predictor = self.oracle
        self.recorder = Recorder(self.runtime) if arguments["records"] else None
        self.routing = Path(arguments["directory"]) / ROUTING

    def counters(self) -> dict[str, float]:
        """The cache's counters and the runtime's clocks."""
        runtime = self.runtime
        counts = dict(zip(COUNTER_NAMES, runtime.cache.counters.tolist(), strict=True))
        return counts | {
            "stall_s": runtime.stall_ns / 1e9,
            "busy_s": runtime.busy_ns / 1e9,
            "policy_s": runtime.policy_ns / 1e9,
            "prefetching_s": runtime.prefetch_ns / 1e9,
            "read_bytes": runtime.read_bytes,
            "tokens": runtime.num_tokens,
        }

    def generate(self, seed: int) -> list[list[int]]:
        """Tokens of all requests of the round, so many at a time."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=1.0, seed=seed, max_tokens=self.arguments["tokens"], ignore_eos=True
        )
        texts = prompts(self.arguments["requests"], seed=seed)
        concurrency, generated = self.arguments["concurrency"], []
        for first in range(0, len(texts), concurrency):
            batch = texts[first : first + concurrency]
            outputs = self.llm.generate(batch, sampling, use_tqdm=False)
            generated += [list(output.outputs[0].token_ids) for output in outputs]
        return generated

    def run(self, seed: int) -> dict[str, Any]:
        """One round's figures."""
        if self.oracle is not None:
            self.oracle.learn(self.routing)
        before, began = self.counters(), time.perf_counter()
        generated = self.generate(seed)
        seconds, after = time.perf_counter() - began, self.counters()
        if self.recorder is not None:
            self.recorder.save(self.routing)
        return {
            **{name: after[name] - before[name] for name in after},
            "seconds": seconds,
            "generated": sum(map(len, generated)),
            "token_hash": hash(tuple(map(tuple, generated))),
            "oracle_wrong": self.oracle.wrong if self.oracle is not None else 0,
        }


def main() -> int:
    """See the module's docstring."""
    answers = take_stdout()
    contestant = Contestant(json.loads(sys.argv[1]))
    slots = contestant.runtime.cache.shape.num_slots
    print(json.dumps({"slots": slots}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(contestant.run(int(line))), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
