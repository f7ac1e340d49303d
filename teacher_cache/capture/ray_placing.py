"""Placing workers on a Ray cluster: their device, their GPUs, and how many of them fit."""

from __future__ import annotations

import os
from collections.abc import Mapping

from llavamod_offline.errors import ConfigError
from llavamod_offline.storage.folders import absolute
from teacher_cache.capture_setup import SetupValues
from teacher_cache.engines.registry import gpus_of


def absolute_values(values: SetupValues) -> SetupValues:
    """The same values, with paths that are valid in any working folder."""
    teacher = values["teacher"]  # perhaps a Hub id
    return {
        **values,
        "data": absolute(values["data"]),
        "teacher": absolute(teacher) if os.path.exists(teacher) else teacher,
    }


def choose_device(values: SetupValues, gpus: float | None, *, has_gpu: bool) -> tuple[SetupValues, float]:
    """Resolve the device `auto`, and the GPUs of a worker if `gpus` is None.

    Errors: `ConfigError` for a device that names one GPU (cuda:1).
    """
    device = values["device"]
    if device == "auto":
        device = "cuda" if has_gpu else "cpu"
    elif ":" in device:
        raise ConfigError(f"device is '{device}': on Ray every worker has its own GPUs: set device=cuda")
    if gpus is None:
        gpus = 0.0 if device == "cpu" else float(gpus_of(values["engine"], values["vllm"]))
    return {**values, "device": device}, gpus


def places(cluster: Mapping[str, float], *, cpus: int, gpus: float) -> int:
    """How many workers fit on a cluster. Errors: `ConfigError` if none fits."""
    needs = {"CPU": cpus, "GPU": gpus}
    fits = {name: int(cluster.get(name, 0) / amount) for name, amount in needs.items() if amount}
    for name, found in fits.items():
        if not found:
            raise ConfigError(
                f"config: engine.{name.lower()}s_per_worker is {needs[name]:g}, the cluster has "
                f"{cluster.get(name, 0):g} in all: lower it, or set device=cpu"
            )
    return min(fits.values())
