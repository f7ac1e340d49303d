"""The settings of a vLLM engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class VllmSettings:
    """vLLM, for engine.kind vllm and vllm_logprobs."""

    max_num_seqs: int = 128
    """Maximum number of sequences processed at once."""
    max_num_batched_tokens: int = 8192
    """Maximum number of tokens processed at once."""
    tensor_parallel: int = 1
    """Number of GPUs that each layer is split over."""
    pipeline_parallel: int = 1
    """Number of pipeline stages that share the layers; the model runs on tensor_parallel × pipeline_parallel GPUs."""
    executor: Literal["mp", "ray"] | None = None
    """How vLLM starts its processes on several GPUs: mp on one machine, ray on the Ray cluster that this machine
    belongs to; null: vLLM's choice."""
    gpu_memory_utilization: float = 0.85
    """Share of each GPU's memory that vLLM uses, above 0 and at most 1."""
    kv_cache_gib: float | None = None
    """Size of the KV cache in GiB; null: what is left of that share, or 1 on a CPU."""
    block_size: int | None = None
    """Tokens per block of the KV cache; null: vLLM's choice."""
    attention_backend: str | None = None
    """One of vLLM's attention backends; null: vLLM's choice."""
    eager: bool = True
    """Run the model without compiling it first."""

    @property
    def gpus(self) -> int:
        """The GPUs that one engine runs on."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def parallel_arguments(self) -> dict[str, Any]:
        """What vLLM's engine takes to spread a model."""
        return {
            "tensor_parallel_size": self.tensor_parallel,
            "pipeline_parallel_size": self.pipeline_parallel,
            "distributed_executor_backend": self.executor,
        }

    def problems(self, section: str) -> Iterator[str]:
        """Yield one line for each problem, naming the key below `section`."""
        counts = ("max_num_seqs", "max_num_batched_tokens", "tensor_parallel", "pipeline_parallel")
        for name in (*counts, "block_size", "kv_cache_gib"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                yield f"{section}.{name} is {value:g}: must be above 0"
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            yield f"{section}.gpu_memory_utilization is {self.gpu_memory_utilization:g}: must be above 0 and at most 1"
