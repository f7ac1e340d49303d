"""Copies between host and device that neither waits for: through pinned memory on a GPU; on a CPU nothing is copied."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: Tensor | NDArray[np.generic], device: torch.device) -> Tensor:
    """Values of the host on a device. A copy to a GPU is queued behind its current work; the host does not wait."""
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A device's tensor on its way to the host, copied once all earlier queued work is done."""

    def __init__(self, tensor: Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(tensor.device))
        else:
            self._host = tensor.cpu()

    def result(self) -> Tensor:
        """Wait for the copy; the tensor on the host."""
        if self._done is not None:
            self._done.synchronize()
        return self._host
