"""Which model writes: the Hugging Face engine, which then also captures, or vLLM, which is restarted for that."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from teacher_cache.capture_setup import CaptureSetup
from teacher_cache.engines.hf import HfCaptureEngine

if TYPE_CHECKING:
    from teacher_cache.engines.protocol import CaptureEngine
    from teacher_cache.generate.vllm_writer import VllmWriter


def load_writer(setup: CaptureSetup) -> HfCaptureEngine | VllmWriter:
    """Load the model that writes. Errors: as `CaptureSetup.load`."""
    if setup.engine == "vllm":
        from teacher_cache.generate.vllm_writer import start_writer

        return start_writer(setup)
    engine = setup.load()
    assert isinstance(engine, HfCaptureEngine)
    return engine


def close_writer(writer: HfCaptureEngine | VllmWriter) -> None:
    """Release what a capture by the same model does not use."""
    if not isinstance(writer, HfCaptureEngine):
        writer.close()


def capture_engine(setup: CaptureSetup, writer: Callable[[], HfCaptureEngine | VllmWriter]) -> CaptureEngine:
    """The engine that captures what `writer` wrote: the writer itself if it can, since its weights are loaded."""
    if setup.engine != "vllm":
        engine = writer()
        assert isinstance(engine, HfCaptureEngine)
        engine.image_pool.waits = setup.waits
        return engine
    return setup.load()
