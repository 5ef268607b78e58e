"""Quantised checkpoints, as the tools that people use write them.

    python -m scripts.quantize MODEL OUT --format int4|int8|gptq|awq|fp8|mxfp4|nvfp4

MODEL is a bfloat16 checkpoint such as ``scripts/demo_model`` and ``scripts/upcycle`` write.
Names of tensors, their bits and ``quantization_config`` are those of released checkpoints:

=====  ========================================  ==============================
int4   compressed-tensors, ``pack-quantized``    ``compressed_tensors``
int8   compressed-tensors, ``int-quantized``     ``compressed_tensors``
gptq   GPTQ's first version (AutoGPTQ)           ``gptq``
awq    AutoAWQ, ``gemm``                         ``awq``
fp8    blocks of 128 x 128, as DeepSeek and Qwen ``fp8``
mxfp4  gpt-oss alone                             ``mxfp4``
nvfp4  blocks of 16, as ModelOpt writes          ``modelopt_fp4``, on GPUs alone
=====  ========================================  ==============================

Values are rounded to the nearest; nothing is calibrated.
"""

from scripts.quantize.layout import QuantizeError
from scripts.quantize.write import FORMATS, quantize

__all__ = ["FORMATS", "QuantizeError", "quantize"]
