"""What vLLM loads in each of its processes (entry point `vllm.general_plugins`): names for the models of `models`."""

from __future__ import annotations

PREFIX = "Offline"


def register() -> None:
    """Name a twin of every architecture of vLLM's; nothing is imported until one is asked for."""
    register_twins(PREFIX, "llavamod_offline.vllm.models")


def register_twins(prefix: str, module: str) -> None:
    """Let `prefix` + X be the attribute of that name in `module`, for every architecture X that vLLM itself has."""
    from vllm import ModelRegistry

    for name, model in list(ModelRegistry.models.items()):
        if getattr(model, "module_name", "vllm.").startswith("vllm."):
            ModelRegistry.register_model(f"{prefix}{name}", f"{module}:{prefix}{name}")
