"""Engines that run the teacher; they take the same requests and give the same records. `registry` lists them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teacher_cache.engines.registry import engine_module

if TYPE_CHECKING:
    from teacher_cache.capture_setup import CaptureSetup
    from teacher_cache.config import CacheTeacherConfig
    from teacher_cache.engines.protocol import CaptureEngine


def load_engine(setup: CaptureSetup, config: CacheTeacherConfig) -> CaptureEngine:
    """Load the teacher's weights. Errors: `ModelError` if they do not fit, `ConfigError` if the device is not there."""
    return engine_module(config.engine.kind).load_engine(setup, config)
