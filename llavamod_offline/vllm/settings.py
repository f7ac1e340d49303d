"""The settings of a vLLM engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class VllmSettings:
    """vLLM, for both of its engines."""

    max_num_seqs: int = 128
    """Most sequences at once."""
    max_num_batched_tokens: int = 8192
    """Most tokens at once."""
    tensor_parallel: int = 1
    """GPUs that share the model."""
    gpu_memory_utilization: float = 0.85
    """Share of a GPU's memory that vLLM uses, above 0 and at most 1."""
    kv_cache_gib: float | None = None
    """Memory for keys and values, in GiB; null: what is left of that share; on a CPU 1."""
    block_size: int | None = None
    """Tokens per block of keys and values; null: vLLM's choice."""
    attention_backend: str | None = None
    """One of vLLM's attention backends; null: vLLM's choice."""
    eager: bool = True
    """Run the model without compiling it first."""

    def problems(self, section: str) -> Iterator[str]:
        """Yield one line for each problem, naming the key below `section`."""
        for name in ("max_num_seqs", "max_num_batched_tokens", "tensor_parallel", "block_size", "kv_cache_gib"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                yield f"{section}.{name} is {value:g}: must be above 0"
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            yield f"{section}.gpu_memory_utilization is {self.gpu_memory_utilization:g}: must be above 0 and at most 1"
