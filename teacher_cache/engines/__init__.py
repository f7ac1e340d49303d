"""Ways to run the teacher, one module each; they take the same requests and give the same records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teacher_cache.config import CacheConfig
    from teacher_cache.engines.protocol import Engine
    from teacher_cache.job import Job


def describe_engine(config: CacheConfig, dtype: str) -> dict[str, Any]:
    """What ran the teacher, in which precision and versions, as JSON values, for the fingerprint.

    Errors: `ConfigError` if the engine is not installed, or cannot capture what is asked for.
    """
    import torch
    import transformers

    described: dict[str, Any] = {
        "name": config.engine.kind,
        "dtype": dtype,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
    if config.engine.kind != "hf":
        from teacher_cache.engines.vllm.describe import describe_limits, describe_vllm

        described |= describe_vllm(config.engine.vllm)
        if config.engine.kind == "vllm_logprobs":
            described["limits"] = describe_limits(config.capture)
    elif config.engine.attention != "sdpa":
        described["attention"] = config.engine.attention
    return described


def load_engine(job: Job, config: CacheConfig) -> Engine:
    """Load the teacher's weights. Errors: `ModelError` if they do not fit, `ConfigError` if the device is not there."""
    if config.engine.kind != "hf":
        from teacher_cache.engines.vllm.engine import load_vllm_engine

        return load_vllm_engine(job, config)
    from teacher_cache.engines.hf_load import load_hf_engine

    return load_hf_engine(job, config)
