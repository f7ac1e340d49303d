"""The device that a setting names."""

from __future__ import annotations

import torch

from llavamod_offline.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """Resolve the setting `device`; `auto` is a GPU if there is one.

    Errors: `ConfigError` for a name that is not a device's, and for a device that this machine lacks.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is '{name}': must be auto, cpu, cuda, or one GPU, such as cuda:1") from error
    if device.type == "cpu":
        return device
    if accelerator is None or device.type != accelerator.type:
        here = "cpu" if accelerator is None else accelerator.type
        raise ConfigError(f"device is '{name}', but torch finds no such device on this machine: set device={here}")
    if device.index is not None and device.index >= torch.accelerator.device_count():
        last = torch.accelerator.device_count() - 1
        raise ConfigError(f"device is '{name}', but the last one here is {accelerator.type}:{last}: set device to it")
    return device
