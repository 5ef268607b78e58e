"""One contestant of the GPU benchmark, in a process of its own: starts an engine, measures it.

    python scripts/gpu_contest.py SPEC.json OUT.jsonl

Called by scripts/bench_gpu.py. Writes a line of JSON per finding, so that what was measured
before a crash or a time limit is not lost. The engine runs in this process: device memory and
the plugin's counters can be read, and no contestant pays for messages between processes.

Kernels that Triton compiles when they are first needed belong into the warm-up. They are counted,
and a repeat in which one was compiled becomes a warm-up and is done again with other prompts.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_moe_offload.device.runtime import DeviceRuntime
    from vllm_moe_offload.runtime import OffloadRuntime

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.demo_model import TOPICS  # noqa: E402
from scripts.gpu_machine import machine  # noqa: E402
from scripts.gpu_plan import Workload  # noqa: E402

WORDS_PER_TOPIC = 64
"""A long prompt goes through all topics, as a long document does; a short one keeps to one."""
WARM_UPS = 1
"""Repeats of each workload before those that count."""
ANY_TOPIC_TEMPERATURE = 10.0
"""Words of all topics are nearly as likely as the request's own; what is no word stays unlikely."""
MOST_EXTRA_WARM_UPS = 3
"""Repeats that are done again because something compiled; then they count, and say so."""


def prompt_text(words: int, topic: int, seed: int) -> str:
    """``words`` words, beginning with ``topic``; the same ones for the same arguments."""
    rng = random.Random(f"{seed} {topic}")
    vocabularies = list(TOPICS.values())
    text: list[str] = []
    while len(text) < words:
        vocabulary = vocabularies[topic % len(vocabularies)].split()
        text += rng.choices(vocabulary, k=min(WORDS_PER_TOPIC, words - len(text)))
        topic += 1
    return " ".join(text)


def prompt_ids(tokenizer: Any, workload: Workload, repeat: int) -> list[list[int]]:
    """Prompts of exactly ``prompt_tokens`` tokens; others at every repeat."""
    prompts = []
    for index in range(workload.batch):
        text = prompt_text(workload.prompt_tokens, topic=repeat + index, seed=repeat)
        ids = tokenizer.encode(text)
        if len(ids) < workload.prompt_tokens:
            raise RuntimeError(f"{workload.prompt_tokens} words became {len(ids)} tokens")
        prompts.append(ids[: workload.prompt_tokens])
    return prompts


Counts = dict[str, float]


class Counters:
    """The plugin's counters, in this process; nothing for other contestants."""

    def __init__(self, llm: Any) -> None:
        from vllm_moe_offload.integration.experts import find_runtime

        executor = llm.llm_engine.model_executor
        self.runtime: Any = find_runtime(executor.driver_worker.worker.model_runner.get_model())

    @property
    def way(self) -> str | None:
        """Who plans (``plan.ways.Way``); None without offload."""
        from vllm_moe_offload.device.runtime import DeviceRuntime

        if self.runtime is None:
            return None
        if not isinstance(self.runtime, DeviceRuntime):
            return "host"
        return "resident" if self.runtime._is_resident else "device"

    def read(self) -> Callable[[], Counts | None]:
        """What gives the counters as they are now, once time does not matter; None without offload.

        What a device counts is copied there, behind the steps that were launched: waiting for it
        would be in the time that is measured.
        """
        from vllm_moe_offload.device.runtime import DeviceRuntime

        runtime = self.runtime
        if runtime is None:
            return lambda: None
        if isinstance(runtime, DeviceRuntime):
            return _on_device(runtime)
        counts = _of_host(runtime)
        return lambda: counts


def _on_device(runtime: DeviceRuntime) -> Callable[[], Counts]:
    num_steps, follow_s = runtime._num_steps, runtime._follow_ns / 1e9
    cache = runtime._cache  # None: all experts are resident, nobody counts
    counters = None if cache is None else cache.counters.clone()

    def read() -> Counts:
        hits, misses = (0, 0) if counters is None else counters.tolist()
        return {
            "hits": hits,
            "misses": misses,
            "prefetch_useful": 0,
            "policy_s": follow_s,
            "steps": num_steps,
        }

    return read


def _of_host(runtime: OffloadRuntime) -> Counts:
    from vllm_moe_offload.cache.planner import COUNTER_NAMES

    counts = dict(zip(COUNTER_NAMES, runtime.cache.counters.tolist(), strict=True))
    return counts | {
        "read_bytes": runtime.read_bytes,
        "stall_s": runtime.stall_ns / 1e9,
        "policy_s": runtime.policy_ns / 1e9,
    }


class Compilations:
    """How many kernels Triton compiled in this process; without Triton there are none.

    Attributes:
        count: since this was made.
        is_counted: whether this Triton (3.4 or later) says so.
    """

    def __init__(self) -> None:
        self.count = 0
        self.is_counted = True
        try:
            import triton
        except ImportError:
            return
        runtime: Any = getattr(getattr(triton, "knobs", None), "runtime", None)
        self.is_counted = hasattr(runtime, "jit_post_compile_hook")
        if self.is_counted:
            self._before = runtime.jit_post_compile_hook
            runtime.jit_post_compile_hook = self._compiled

    def _compiled(self, **event: Any) -> Any:
        """Triton's hook. vLLM's monitor puts its own before it and calls this one."""
        self.count += 1
        return self._before(**event) if self._before is not None else None


def measure(llm: Any, workload: Workload, repeat: int, counters: Counters) -> dict[str, Any]:
    """One repeat of a workload.

    Returns:
        ``prefill_s``: from the requests to the first token of the last of them;
        ``step_s``: per decode step after that; ``step_times_s``: when each step ended, from
        the first token on; ``counters``: what the plugin counted in the phase that the
        workload is about; ``tokens``: what was generated, per request.
    """
    engine = llm.llm_engine
    names = [f"{workload.name}-{repeat}-{index}" for index in range(workload.batch)]
    tokens: dict[str, list[int]] = {name: [] for name in names}
    prompts = prompt_ids(llm.get_tokenizer(), workload, repeat)
    before = counters.read()
    began = time.perf_counter()
    for index, (name, ids) in enumerate(zip(names, prompts, strict=True)):
        sampling = sampling_of(workload, repeat, index)
        engine.add_request(name, {"prompt_token_ids": ids}, sampling)
    first: float | None = None
    behind, at_first, step_times = 0, before, []
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            tokens[output.request_id] = list(output.outputs[0].token_ids)
        if first is not None:
            if outputs:  # steps are scheduled ahead: the last one may come back empty
                step_times.append(round(now - first, 6))
        elif all(tokens.values()):
            first, at_first = now, counters.read()
            # Where some requests waited for others, these have more tokens already.
            behind = min(map(len, tokens.values()))
    after = counters.read()
    counts = {name: len(ids) for name, ids in tokens.items()}
    if first is None or counts != dict.fromkeys(names, workload.new_tokens):
        raise RuntimeError(f"{workload.new_tokens} tokens were asked for, what came: {counts}")
    steps = workload.new_tokens - behind
    decode_s = step_times[-1] if step_times else 0.0
    phase = (at_first, after) if workload.is_decode else (before, at_first)
    began_with, ended_with = (reading() for reading in phase)
    return {
        "repeat": repeat,
        "prefill_s": first - began,
        "decode_s": decode_s,
        "steps": steps,
        "step_s": decode_s / steps if steps else None,
        "step_times_s": step_times,
        "counters": difference(began_with, ended_with),
        "tokens": list(tokens.values()),
    }


def sampling_of(workload: Workload, repeat: int, index: int) -> Any:
    """Of one request: greedy, or words of any topic, the same ones for every contestant."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=workload.new_tokens,
        ignore_eos=True,
        detokenize=False,
        skip_clone=True,
    )
    if workload.any_topic:
        # Set afterwards, and not cloned: what users may ask for ends at a temperature of 2.
        sampling.temperature = ANY_TOPIC_TEMPERATURE
        sampling.seed = repeat * workload.batch + index
    return sampling


def difference(
    before: Mapping[str, float] | None, after: Mapping[str, float] | None
) -> dict[str, float] | None:
    """What was counted between two readings."""
    if before is None or after is None:
        return None
    return {name: after[name] - before[name] for name in after}


def host_memory(status: str) -> dict[str, int | None]:
    """Bytes that a process holds on the host, from its ``/proc/PID/status``.

    ``host_anonymous_bytes`` leaves out files that are mapped, such as checkpoints. None: a
    system that does not tell (gVisor has the whole resident set alone).
    """
    sizes = {}
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if value.endswith("kB"):
            sizes[name] = int(value.split()[0]) * 1024
    return {
        "host_anonymous_bytes": sizes.get("RssAnon"),
        "host_shared_bytes": sizes.get("RssShmem"),
        "host_peak_bytes": sizes.get("VmHWM"),
        "host_resident_bytes": sizes.get("VmRSS"),
    }


def memory() -> dict[str, int | None]:
    """See :func:`host_memory`; the device's too, if there is one."""
    import torch

    found = host_memory(Path("/proc/self/status").read_text())
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found |= {
            "device_used_bytes": total - free,
            "device_total_bytes": total,
            "device_peak_allocated_bytes": torch.cuda.max_memory_allocated(),
            "device_peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        }
    return found


def contest(spec: Mapping[str, Any], out: Path) -> None:
    """Runs all workloads until the time is over."""
    began = time.perf_counter()
    deadline = began + spec["limit_s"]

    def note(kind: str, **finding: Any) -> None:
        with out.open("a") as file:
            file.write(json.dumps({"kind": kind, **finding}) + "\n")

    from vllm import LLM

    engine = dict(spec["engine"])
    for name in ("cpu_offload_params", "offload_params"):
        if name in engine:
            engine[name] = set(engine[name])
    if spec["offload"] is not None:
        engine["additional_config"] = {"moe_offload": spec["offload"]}
    compilations = Compilations()
    with machine(spec["device"]):
        llm = LLM(spec["model"], **engine)
    counters = Counters(llm)
    if (counters.runtime is not None) != (spec["offload"] is not None):
        raise RuntimeError("the plugin runs where it should not, or does not where it should")
    note(
        "ready",
        start_s=time.perf_counter() - began,
        memory=memory(),
        counts_compilations=compilations.is_counted,
        way=counters.way,
    )
    for fields in spec["workloads"]:
        run_workload(
            llm, Workload(**fields), counters, compilations, deadline=deadline, note=note
        )
    note("memory", memory=memory())
    note("end", seconds=time.perf_counter() - began)


def run_workload(
    llm: Any,
    workload: Workload,
    counters: Counters,
    compilations: Compilations,
    *,
    deadline: float,
    note: Any,
) -> None:
    """All repeats of one workload, after those that warm up.

    Repeats are numbered through, warm-ups included: each has prompts of its own.
    """
    took = 0.0
    repeat = measured = extra = 0
    while measured < workload.repeats:
        began = time.perf_counter()
        if began + took > deadline:
            note("short", workload=workload.name, measured=measured, **_asked(workload))
            return
        before = compilations.count
        sample = measure(llm, workload, repeat, counters)
        took = time.perf_counter() - began
        compiled = compilations.count - before
        if repeat < WARM_UPS:
            note("warm-up", workload=workload.name, repeat=repeat, compiled=compiled)
        elif compiled and extra < MOST_EXTRA_WARM_UPS:
            extra += 1
            note("warm-up", workload=workload.name, repeat=repeat, compiled=compiled)
        else:
            measured += 1
            note("sample", workload=workload.name, sample=sample | {"compiled": compiled})
        repeat += 1


def _asked(workload: Workload) -> dict[str, Any]:
    return {"asked": asdict(workload)}


def main(arguments: Sequence[str]) -> int:
    """``SPEC.json OUT.jsonl``."""
    spec_path, out = map(Path, arguments)
    contest(json.loads(spec_path.read_text()), out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
