"""What code does that is captured in a CUDA graph: it never waits, and makes no tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {"_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero", "masked_select"}
"""Operators whose result the host has to know."""


class InAGraph(TorchDispatchMode):
    """Fails on operators that a captured graph cannot hold, or that make a tensor."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits for the device"
        out = func(*args, **(kwargs or {}))
        known = {
            tensor.untyped_storage().data_ptr()
            for tensor in tree_leaves((args, kwargs))
            if isinstance(tensor, torch.Tensor)
        }
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                is_known = tensor.untyped_storage().data_ptr() in known
                assert is_known, f"{name} makes a tensor"
        return out
