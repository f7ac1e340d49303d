"""What vLLM loads in each of its processes (entry point `vllm.general_plugins`): names for the models of `models`."""

from __future__ import annotations

from llavamod_offline.vllm.plugin import register_twins

PREFIX = "Records"


def register() -> None:
    """Register a recording twin of every vLLM architecture; nothing is imported until one is asked for."""
    register_twins(PREFIX, "teacher_cache.engines.vllm.models")
