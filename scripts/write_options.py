"""Writes docs/options.md from the options' declarations (`make docs`).

    python scripts/write_options.py [--check]

--check writes nothing and exits with 1 if the page is not current.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vllm_moe_offload.config import Option, options  # noqa: E402

PAGE = ROOT / "docs" / "options.md"

HEAD = """\
<!-- Written by scripts/write_options.py (`make docs`) from vllm_moe_offload/config.py.
     Edit the descriptions there. -->

# Options

Every command that takes vLLM's engine arguments has them: `vllm serve`, `vllm bench latency`,
`vllm bench throughput`. `vllm serve --help=moe-offload` says the same as this page.

    vllm serve MODEL --moe-offload=trace                                    # MODE, by itself
    vllm serve MODEL --moe-offload=trace --moe-offload-config.cache_gb 24   # one option
    vllm serve MODEL --moe-offload=trace \\
        --moe-offload-config '{"cache_gb": 24, "store_dir": "/nvme/experts"}'   # several

From Python, with the mode among them:

    LLM(model, additional_config={"moe_offload": {"mode": "trace", "cache_gb": "50%"}})

An unknown option, or a value that is not possible, ends the start with a message that names the
option, the value and what is allowed ([troubleshooting.md](troubleshooting.md)).

"""

TAIL = """
## Of vLLM's own options

| option | why it matters here |
|---|---|
| `--kv-cache-memory-bytes` | fixes the KV cache; `cache_gb` `auto` then gives experts all the rest |
| `--gpu-memory-utilization` | what `auto` divides; on a CPU, of RAM: by default what is free |
| `--max-model-len` | a long default may ask for more KV cache than is left |
| `--shutdown-timeout` | time to write `record_trace` at exit; set to 60 s with it, if it was 0 |

`vllm-moe-offload plan` works these out for a machine: [sizing.md](sizing.md).
"""


def page() -> str:
    """The whole document."""
    return HEAD + "\n".join(_section(option) for option in options()) + TAIL


def _section(option: Option) -> str:
    flag = (
        "--moe-offload MODE"
        if option.name == "mode"
        else (f"--moe-offload-config.{option.name} VALUE")
    )
    rows = [
        ("type", option.type),
        ("unit", option.unit or "none"),
        ("default", f"`{option.default}`" if " " not in option.default else option.default),
        ("flag", f"`{flag}`"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"## `{option.name}`\n\n{option.description}\n\n| | |\n|---|---|\n{table}\n"


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare only")
    arguments = parser.parse_args()
    text = page()
    if arguments.check:
        if PAGE.exists() and PAGE.read_text() == text:
            return 0
        print(f"{PAGE.relative_to(ROOT)} is not current: run `make docs`", file=sys.stderr)
        return 1
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
