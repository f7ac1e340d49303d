"""The engines by the name of `engine.kind`: one module each, imported on first use."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

if TYPE_CHECKING:
    from llavamod_offline.vllm.settings import VllmSettings
    from teacher_cache.capture_setup import CaptureSetup, SetupValues
    from teacher_cache.engines.protocol import CaptureEngine


@dataclass(frozen=True)
class EngineEntry:
    """An engine's module, and what it can do.

    `writes_answers`: for `generate`; `spreads`: vLLM may spread its model over GPUs; `served`: another process has the
    weights, so neither a device nor weights are needed here; `listed`: it gives no logits, only the most likely ids
    (see `listed`).
    """

    module: str
    writes_answers: bool = False
    spreads: bool = False
    served: bool = False
    listed: bool = False


EngineName = Literal["hf", "vllm", "vllm_logprobs", "server"]

ENGINES: dict[str, EngineEntry] = {
    "hf": EngineEntry("teacher_cache.engines.hf_load", writes_answers=True),
    "vllm": EngineEntry("teacher_cache.engines.vllm.engine", writes_answers=True, spreads=True),
    "vllm_logprobs": EngineEntry("teacher_cache.engines.vllm.logprobs", spreads=True, listed=True),
    "server": EngineEntry("teacher_cache.engines.server.engine", served=True, listed=True),
}


def gpus_of(kind: str, vllm: VllmSettings) -> int:
    """The GPUs that one engine on GPUs runs on."""
    return vllm.gpus if ENGINES[kind].spreads else 1


class EngineModule(Protocol):
    """What the module of an engine defines."""

    def load_engine(self, setup: CaptureSetup) -> CaptureEngine:
        """Load the teacher; see `CaptureSetup.load`."""
        ...

    def describe(self, given: SetupValues) -> dict[str, Any]:
        """What changes its arithmetic, for the fingerprint; see `describe_engine`."""
        ...


def engine_module(kind: str) -> EngineModule:
    """Import the module of an engine."""
    return cast("EngineModule", importlib.import_module(ENGINES[kind].module))


def describe_engine(given: SetupValues, dtype: str, device: str) -> dict[str, Any]:
    """What ran the teacher, in which precision and versions, as JSON values for the fingerprint.

    Two captures with equal descriptions differ by no more than the order of their sums, so batch sizes, threads, the
    number of devices and the device's index are left out.
    Errors: `ConfigError` if the engine is not installed, or cannot capture what is asked for.
    """
    import torch
    import transformers

    return {
        "name": given["engine"],
        "dtype": dtype,
        "head_dtype": "float32",  # of the LM head's products and their sums, whatever the model's own type
        "device": device.partition(":")[0],
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        **engine_module(given["engine"]).describe(given),
    }
