"""What ran a teacher, as the fingerprint names it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from teacher_cache.engines.registry import engine_module

if TYPE_CHECKING:
    from teacher_cache.config import CacheTeacherConfig


def describe_engine(config: CacheTeacherConfig, dtype: str, device: str) -> dict[str, Any]:
    """What ran the teacher, in which precision and versions, as JSON values, for the fingerprint.

    It holds what chooses the arithmetic, so that two captures of one description differ by no more than the order of
    their sums: batch sizes, threads and the number of devices do not enter, nor does which of its kind a device is.
    Errors: `ConfigError` if the engine is not installed, or cannot capture what is asked for.
    """
    import torch
    import transformers

    return {
        "name": config.engine.kind,
        "dtype": dtype,
        "head_dtype": "float32",  # of the LM head's products and their sums, whatever the model's own type
        "device": device.partition(":")[0],
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        **engine_module(config.engine.kind).describe(config.engine, config.capture),
    }
