"""Writes a GGUF file in Q4_0, by llama.cpp; in llama-cpp-python's environment.

python quantise.py SOURCE TARGET
"""

from __future__ import annotations

import sys

import llama_cpp


def main() -> int:
    """Exit status: llama.cpp's, 0 if it wrote the file."""
    source, target = sys.argv[1:]
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    return int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), parameters))


if __name__ == "__main__":
    sys.exit(main())
