"""Ways to run the teacher, one module each; they take the same requests and give the same records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teacher_cache.config import CacheConfig
    from teacher_cache.engines.protocol import Engine
    from teacher_cache.job import Job


def describe_engine(config: CacheConfig, dtype: str) -> dict[str, Any]:
    """What ran the teacher, in which precision and versions, as JSON values, for the fingerprint."""
    import torch
    import transformers

    return {
        "name": config.engine.kind,
        "dtype": dtype,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def load_engine(job: Job, config: CacheConfig) -> Engine:
    """Load the teacher's weights. Errors: `ModelError` if they do not fit, `ConfigError` if the device is not there."""
    from teacher_cache.engines.hf import load_hf_engine

    return load_hf_engine(job, config)
