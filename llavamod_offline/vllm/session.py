"""Run vLLM in this process: start it on a checkpoint folder, and keep a window of requests in flight."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch

from llavamod_offline.errors import ConfigError, LlavaModError, ModelError, first_line
from llavamod_offline.models.checkpoint import read_json
from llavamod_offline.vllm.overrides import config_overrides
from llavamod_offline.vllm.settings import VllmSettings
from llavamod_offline.vllm.weights import check_weights

_LOG = logging.getLogger(__name__)
Tag = TypeVar("Tag")

_SHOWN = 300
# In one process, requests reach the scheduler in our order, so that batches are the same in every run.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def import_vllm() -> Any:
    """Import vLLM, in one process, offline and quiet unless the environment overrides it.

    Errors: `ConfigError` if it is not installed, or incompatible with other packages.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"vLLM cannot be imported ({first_line(error)}): install the extra 'vllm', or use the engine hf"
        ) from error
    return vllm


class Session:
    """vLLM on one checkpoint folder, as `prefix` + its architecture; `options` are further vLLM arguments.

    `register` registers these names in this process; vLLM's other processes find the plugin by its entry point.
    Errors: `ConfigError` for a device that this vLLM does not support; `ModelError` if the checkpoint is incomplete, or
    vLLM cannot load it.
    """

    def __init__(
        self,
        folder: Path,
        settings: VllmSettings,
        *,
        prefix: str,
        register: Callable[[], None],
        dtype: str,
        device: str,
        max_length: int,
        **options: Any,
    ) -> None:
        vllm = import_vllm()
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        _check_device(device)
        register()
        model = f"{prefix}{_architecture(folder)}"
        check_weights(folder)
        memory = settings.kv_cache_gib or (1.0 if device == "cpu" else None)
        state = torch.random.get_rng_state()  # vLLM seeds the process's generators
        try:
            self.engine: Any = LLMEngine.from_engine_args(
                EngineArgs(
                    model=str(folder),
                    hf_overrides={"architectures": [model], "head_dtype": "float32", **config_overrides(folder)},
                    dtype=dtype,
                    max_model_len=max_length,
                    max_num_seqs=settings.max_num_seqs,
                    max_num_batched_tokens=max(settings.max_num_batched_tokens, settings.max_num_seqs),
                    **settings.parallel_arguments,
                    gpu_memory_utilization=settings.gpu_memory_utilization,
                    kv_cache_memory_bytes=None if memory is None else int(memory * 2**30),
                    block_size=settings.block_size,
                    attention_backend=settings.attention_backend,
                    enforce_eager=settings.eager,
                    enable_chunked_prefill=True,
                    enable_prefix_caching=True,
                    mm_processor_cache_gb=0,  # images arrive preprocessed,
                    mm_device_do_normalize=False,  # and normalised
                    disable_log_stats=True,
                    use_tqdm_on_load=False,
                    **options,
                )
            )
        except LlavaModError:
            raise
        except Exception as error:  # vLLM may raise anything
            raise ModelError(f"{folder}: vLLM cannot load it: {_reason(error)}: use the engine hf") from error
        finally:
            torch.random.set_rng_state(state)
        self.window = 2 * settings.max_num_seqs
        self.block_size = int(self.engine.vllm_config.cache_config.block_size)
        self.longest = max_length - (options.get("runner") == "generate")  # one token is generated
        self._count = 0
        _LOG.info("vLLM %s: attention %s, blocks of %d tokens", vllm.__version__, self._attention(), self.block_size)

    def run(self, requests: Iterable[tuple[Tag, Any, Any]]) -> Generator[tuple[Tag, Any]]:
        """Run (tag, prompt, parameters); yield (tag, output) as they finish. The window is refilled before each step.

        Errors: `ModelError` with vLLM's reason if a step fails. Closing the generator early aborts its requests.
        """
        waiting = iter(requests)
        flying: dict[str, Tag] = {}
        more = True
        try:
            while more or flying:
                while more and len(flying) < self.window:
                    item = next(waiting, None)
                    if item is None:
                        more = False
                        break
                    tag, prompt, parameters = item
                    name = str(self._count)
                    self._count += 1
                    self._guarded(self.engine.add_request, name, prompt, parameters)
                    flying[name] = tag
                if flying:
                    finished = [(flying.pop(output.request_id), output) for output in self._guarded(self.engine.step)]
                    yield from finished
        finally:
            if flying:
                self.engine.abort_request(list(flying))

    def forget(self) -> None:
        """Drop cached prompts and images, so that earlier runs do not affect later ones."""
        self.engine.reset_prefix_cache()
        self.engine.reset_encoder_cache()

    def close(self) -> None:
        """Release the memory."""
        self.engine.engine_core.shutdown()

    def _attention(self) -> str:
        """The attention backends that vLLM chose; unknown if the model is in other processes."""
        layers = self.engine.vllm_config.compilation_config.static_forward_context.values()
        names = {layer.attn_backend.get_name() for layer in layers if hasattr(layer, "attn_backend")}
        return ", ".join(sorted(names)) or "chosen by vLLM"

    def _guarded(self, call: Any, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except LlavaModError:
            raise
        except Exception as error:
            raise ModelError(f"vLLM failed: {_reason(error)}: use the engine hf") from error


def _architecture(folder: Path) -> str:
    """A checkpoint's architecture. Errors: `ModelError` unless there is exactly one, which vLLM supports."""
    from vllm import ModelRegistry

    named = read_json(folder, "config.json").get("architectures") or []
    if len(named) != 1 or named[0] not in ModelRegistry.get_supported_archs():
        raise ModelError(f"{folder}/config.json: vLLM has no model for architectures {named}: use the engine hf")
    return str(named[0])


def _check_device(device: str) -> None:
    from vllm.platforms import current_platform

    there = current_platform.device_type
    kind, _, number = device.partition(":")
    if kind != there:
        raise ConfigError(f"device '{device}': this vLLM runs only on '{there}': set device={there or 'cpu'}")
    if number:
        raise ConfigError(
            f"device '{device}': vLLM uses the first visible one: set device={kind} and CUDA_VISIBLE_DEVICES={number}"
        )


def _reason(error: BaseException) -> str:
    """The first line of the root cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and "validation error" in lines[0]:  # the heading of pydantic's list of errors
        lines = lines[1:]
    return lines[0][:_SHOWN] if lines else type(error).__name__
