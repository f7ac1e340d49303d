"""The settings of a vLLM engine."""

from __future__ import annotations

from dataclasses import dataclass

from llavamod_offline.errors import ConfigError


@dataclass(frozen=True)
class VllmSettings:
    """How vLLM uses its device: at most `max_num_seqs` sequences and `max_num_batched_tokens` tokens at once.

    `tensor_parallel` GPUs share the model; vLLM uses `gpu_memory_utilization` of a GPU's memory, `kv_cache_gib` of it
    for keys and values (null: the rest; on a CPU 1), in blocks of `block_size` tokens (null: vLLM's choice).
    `attention_backend`: one of vLLM's (null: its choice). `eager: false` compiles the model first.
    """

    max_num_seqs: int = 128
    max_num_batched_tokens: int = 8192
    tensor_parallel: int = 1
    gpu_memory_utilization: float = 0.85
    kv_cache_gib: float | None = None
    block_size: int | None = None
    attention_backend: str | None = None
    eager: bool = True

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "tensor_parallel", "block_size", "kv_cache_gib"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"config: vllm.{name} is {value:g}, must be more than 0")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(
                f"config: vllm.gpu_memory_utilization is {self.gpu_memory_utilization:g}, must lie in 0 … 1"
            )
