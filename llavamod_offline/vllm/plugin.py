"""vLLM's plugin (entry point `vllm.general_plugins`), loaded in each of its processes: registers `models`."""

from __future__ import annotations

PREFIX = "Offline"


def register() -> None:
    """Register a twin of each of vLLM's architectures; each is imported on first use."""
    register_twins(PREFIX, "llavamod_offline.vllm.models")


def register_twins(prefix: str, module: str) -> None:
    """Register `prefix` + X as the attribute of that name in `module`, for each of vLLM's own architectures X."""
    from vllm import ModelRegistry

    for name, model in list(ModelRegistry.models.items()):
        if getattr(model, "module_name", "vllm.").startswith("vllm."):
            ModelRegistry.register_model(f"{prefix}{name}", f"{module}:{prefix}{name}")
