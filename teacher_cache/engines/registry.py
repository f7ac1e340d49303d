"""The engines by the name of `engine.kind`: each one module, imported when it is needed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from llavamod_offline.vllm.settings import VllmSettings
    from teacher_cache.engines.protocol import CaptureEngine

ENGINES = {
    "hf": "teacher_cache.engines.hf_load",
    "vllm": "teacher_cache.engines.vllm.engine",
    "vllm_logprobs": "teacher_cache.engines.vllm.logprobs",
}


class EngineModule(Protocol):
    """What the module of an engine defines. `WRITES_ANSWERS`: whether `cache-teacher generate` can use it."""

    WRITES_ANSWERS: bool

    def load_engine(self, setup: Any, config: Any) -> CaptureEngine:
        """Load the teacher that a `CaptureSetup` and its `CacheTeacherConfig` name."""
        ...

    def describe(self, engine: Any, capture: Any) -> dict[str, Any]:
        """What changes its arithmetic, for the fingerprint, of a `TeacherEngineConfig` and `CaptureConfig`.

        Errors: `ConfigError` if it is not installed, or cannot capture what is asked for.
        """
        ...

    def gpus(self, vllm: VllmSettings) -> int:
        """How many GPUs a worker on Ray takes by default."""
        ...


def engine_module(kind: str) -> EngineModule:
    """Import the module of an engine."""
    return cast("EngineModule", importlib.import_module(ENGINES[kind]))
