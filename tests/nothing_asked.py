"""Refuses operations that make the host wait for the GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "bincount")


class NothingAsked(TorchDispatchMode):
    """Inside the block, no tensor's values may be read in Python or decide the size of a result."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for argument in args
            if isinstance(argument, list | tuple)
            for index in argument
        )
        assert name not in _WAITING, f"{name} waits for the device"
        assert not by_mask, f"{name} by a mask waits for the device"
        return func(*args, **(kwargs or {}))
