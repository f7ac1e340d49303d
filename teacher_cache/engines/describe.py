"""What ran a teacher, as the fingerprint names it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teacher_cache.config import CacheConfig


def describe_engine(config: CacheConfig, dtype: str, device: str) -> dict[str, Any]:
    """What ran the teacher, in which precision and versions, as JSON values, for the fingerprint.

    It holds what chooses the arithmetic, so that two captures of one description differ by no more than the order of
    their sums: batch sizes, threads and the number of devices do not enter, nor does which of its kind a device is.
    Errors: `ConfigError` if the engine is not installed, or cannot capture what is asked for.
    """
    import torch
    import transformers

    described: dict[str, Any] = {
        "name": config.engine.kind,
        "dtype": dtype,
        "head_dtype": "float32",  # of the head's products and their sums, whatever the model's own type
        "device": device.partition(":")[0],
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
    if config.engine.kind != "hf":
        from teacher_cache.engines.vllm.describe import describe_limits, describe_vllm

        described |= describe_vllm(config.engine.vllm)
        if config.engine.kind == "vllm_logprobs":
            described["limits"] = describe_limits(config.capture)
        return described
    if config.engine.attention != "sdpa":
        described["attention"] = config.engine.attention
    if config.engine.compile:  # joins operations, between which a model in half precision would round
        described["compile"] = True
    return described
