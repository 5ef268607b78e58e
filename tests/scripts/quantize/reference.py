"""What quantised tensors stand for, read bit by bit, without the code that wrote them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word each of eight neighbours lies; vLLM's ``_REVERSE_AWQ_PACK_ORDER``."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def nibbles(words: Tensor, places: tuple[int, ...] = tuple(range(8))) -> Array:
    """int32 ``[rows, n]`` as ``[rows, 8 n]``: the value at each of ``places``, low bits first."""
    bits = words.numpy().view(np.uint32)
    parts = [(bits >> np.uint32(4 * place)) & np.uint32(15) for place in places]
    return np.stack(parts, axis=-1).reshape(bits.shape[0], -1).astype(np.int64)


def numbers(tensor: Tensor) -> Array:
    """As float64."""
    return tensor.double().numpy()


def int4(stored: Mapping[str, Tensor], module: str) -> Array:
    """compressed-tensors: eight inputs a word, 8 more than the value."""
    values = nibbles(stored[f"{module}.weight_packed"]) - 8
    scale = numbers(stored[f"{module}.weight_scale"])
    assert list(values.shape) == stored[f"{module}.weight_shape"].tolist()
    return values * np.repeat(scale, values.shape[1] // scale.shape[1], axis=1)


def int8(stored: Mapping[str, Tensor], module: str) -> Array:
    return numbers(stored[f"{module}.weight"]) * numbers(stored[f"{module}.weight_scale"])


def gptq(stored: Mapping[str, Tensor], module: str) -> Array:
    """GPTQ: eight inputs a word, ``[in, out]``; the zero point is one more than stored."""
    values = nibbles(stored[f"{module}.qweight"].T.contiguous()).T
    group = stored[f"{module}.g_idx"].numpy()
    zeros = nibbles(stored[f"{module}.qzeros"]) + 1
    return ((values - zeros[group]) * numbers(stored[f"{module}.scales"])[group]).T


def awq(stored: Mapping[str, Tensor], module: str) -> Array:
    """AWQ: eight outputs a word, out of order, ``[in, out]``."""
    values = nibbles(stored[f"{module}.qweight"], AWQ_PLACES)
    scale = numbers(stored[f"{module}.scales"])
    zeros = nibbles(stored[f"{module}.qzeros"], AWQ_PLACES)
    group = np.arange(values.shape[0]) // (values.shape[0] // scale.shape[0])
    return ((values - zeros[group]) * scale[group]).T


def fp8(stored: Mapping[str, Tensor], module: str) -> Array:
    values = numbers(stored[f"{module}.weight"])
    rows, columns = (np.arange(size) // 128 for size in values.shape)
    return values * numbers(stored[f"{module}.weight_scale_inv"])[np.ix_(rows, columns)]


def mxfp4(stored: Mapping[str, Tensor], module: str) -> Array:
    """gpt-oss: ``[experts, in, out]``, as in the checkpoint that is not quantised."""
    blocks = stored[f"{module}_blocks"].numpy()
    code = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 32)
    exponent = stored[f"{module}_scales"].numpy().astype(np.int64) - 127
    values = np.array(E2M1)[code] * np.exp2(exponent)[..., None]
    return values.reshape(*blocks.shape[:2], -1).swapaxes(1, 2)


def nvfp4(stored: Mapping[str, Tensor], module: str) -> Array:
    """ModelOpt: two scales, of 16 inputs and of the tensor."""
    blocks = stored[f"{module}.weight"].numpy()
    code = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(blocks.shape[0], -1, 16)
    scale = numbers(stored[f"{module}.weight_scale"].float())
    scale = scale * numbers(stored[f"{module}.weight_scale_2"])
    return (np.array(E2M1)[code] * scale[..., None]).reshape(blocks.shape[0], -1)


DEQUANTISERS: dict[str, Callable[[Mapping[str, Tensor], str], Array]] = {
    "int4": int4,
    "int8": int8,
    "gptq": gptq,
    "awq": awq,
    "fp8": fp8,
    "mxfp4": mxfp4,
    "nvfp4": nvfp4,
}
MARKS = {
    "int4": ".weight_packed",
    "int8": ".weight_scale",
    "gptq": ".g_idx",
    "awq": ".qzeros",
    "fp8": ".weight_scale_inv",
    "mxfp4": "_blocks",
    "nvfp4": ".weight_scale_2",
}
"""End of the name of a tensor that only quantised modules have."""


def dequantised(stored: Mapping[str, Tensor], format: str) -> dict[str, Tensor]:
    """Tensors of a quantised checkpoint as bfloat16, named as before it was quantised."""
    mark = MARKS[format]
    modules = {name.removesuffix(mark) for name in stored if name.endswith(mark)}
    read = DEQUANTISERS[format]
    found: dict[str, Tensor] = {}
    for module in modules:
        name = module if format == "mxfp4" else f"{module}.weight"
        found[name] = torch.from_numpy(read(stored, module)).bfloat16().contiguous()
    for name, tensor in stored.items():
        # Parts of a quantised module: ``MODULE.part``, or ``MODULE_part`` of gpt-oss.
        parts = {name.rsplit(".", 1)[0], name.removesuffix("_blocks").removesuffix("_scales")}
        if not parts & modules:
            found[name] = tensor
    return found
