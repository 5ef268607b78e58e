"""llama.cpp as bench_llamacpp.py's contestant; runs in llama-cpp-python's environment.

    python scripts/llamacpp/contestant.py ARGUMENTS_AS_JSON

Maps a GGUF file, says how it was built, then answers a turn per line on stdin: prompts as token
ids, one after the other, each with the time of every token. JSON in one line each.

Everything that is not asked for is as llama-cpp-python has it. Tokens are drawn from the whole
vocabulary, as vLLM draws them by default, and the end of a text ends nothing.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from scripts.harness.engine import take_stdout  # noqa: E402

UNCHANGED = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
"""What :meth:`llama_cpp.Llama.generate` gets, so that probabilities stay the model's."""


def load(arguments: dict[str, Any]) -> llama_cpp.Llama:
    """The model, mapped; ``repack``: whether weights may be copied into another layout."""
    defaults = llama_cpp.llama_model_default_params

    def with_repack() -> Any:
        parameters = defaults()
        parameters.use_extra_bufts = arguments["repack"]
        return parameters

    # The constructor has no argument for it and asks for the defaults by this name.
    llama_cpp.llama_cpp.llama_model_default_params = with_repack
    return llama_cpp.Llama(
        arguments["gguf"],
        n_ctx=arguments["context"],
        n_threads=arguments["threads"],
        use_mmap=True,
        use_mlock=False,
        seed=1,  # 0 would be taken for none
        verbose=True,  # its log says which buffers hold the weights
    )


def bytes_read() -> int:
    """What this process had read from disks so far, mapped pages with it."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def answer(
    llama: llama_cpp.Llama, prompt: list[int], tokens: int, temperature: float
) -> dict[str, Any]:
    """One prompt: seconds from the request to each token, and what was read meanwhile."""
    llama.reset()  # or the beginning that prompts share would not be computed again
    llama_cpp.llama_perf_context_reset(llama.ctx)
    ids, seconds = [], []
    read, faults = bytes_read(), resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    began = time.perf_counter()
    for token in llama.generate(prompt, temp=temperature, **UNCHANGED):
        seconds.append(time.perf_counter() - began)
        ids.append(token)
        if len(ids) == tokens:
            break
    own = llama_cpp.llama_perf_context(llama.ctx)
    return {
        "prompt_tokens": len(prompt),
        "token_s": seconds,
        "engine_decode_s": own.t_eval_ms / 1000,
        "engine_decoded": own.n_eval,
        "read_bytes": bytes_read() - read,
        "major_faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults,
        "text": llama.detokenize(ids).decode(errors="replace"),
    }


def main() -> None:
    """See the module's docstring."""
    answers = take_stdout()

    def say(what: Any) -> None:
        print(json.dumps(what), file=answers, flush=True)

    arguments = json.loads(sys.argv[1])
    began = time.perf_counter()
    llama = load(arguments)
    say(
        {
            "load_s": time.perf_counter() - began,
            "version": llama_cpp.__version__,
            "system_info": llama_cpp.llama_print_system_info().decode().strip(),
            "cores_allowed": len(os.sched_getaffinity(0)),
        }
    )
    for line in sys.stdin:
        turn = json.loads(line)
        say([answer(llama, p, turn["tokens"], turn["temperature"]) for p in turn["prompts"]])


if __name__ == "__main__":
    main()
