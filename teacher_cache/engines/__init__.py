"""Ways to run the teacher, one module each; they take the same requests and give the same records."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from teacher_cache.capture_setup import CaptureSetup
    from teacher_cache.config import CacheTeacherConfig
    from teacher_cache.engines.protocol import CaptureEngine


def load_engine(job: CaptureSetup, config: CacheTeacherConfig) -> CaptureEngine:
    """Load the teacher's weights. Errors: `ModelError` if they do not fit, `ConfigError` if the device is not there."""
    if config.engine.kind != "hf":
        from teacher_cache.engines.vllm.engine import load_vllm_engine

        return load_vllm_engine(job, config)
    from teacher_cache.engines.hf_load import load_hf_engine

    return load_hf_engine(job, config)
