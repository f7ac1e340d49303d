"""Loading a teacher for the Hugging Face engine: devices, attention, compiling, and what is tried out beforehand.

Shape suffixes: V shared vocabulary.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from llavamod_offline.errors import ConfigError, ModelError
from teacher_cache.engines.hf import HfCaptureEngine
from teacher_cache.engines.lm_head import LmHead

if TYPE_CHECKING:
    from llavamod_offline.vllm.settings import VllmSettings
    from teacher_cache.capture_setup import CaptureSetup
    from teacher_cache.config import CacheTeacherConfig, CaptureConfig, TeacherEngineConfig

_SHARING_ATTENTION = "sdpa"
WRITES_ANSWERS = True


def load_engine(setup: CaptureSetup, config: CacheTeacherConfig) -> HfCaptureEngine:
    """Load the weights onto the device, or the devices.

    Errors: `ModelError` if they do not fit config.json, or their logits are more than a linear map of the last hidden
    states; `ConfigError` for a missing device or package.
    """
    model = setup.teacher.load(setup.dtype, **_load_settings(setup, config))
    layer = model.get_output_embeddings()
    rows = int(layer.weight.shape[0])
    if rows < setup.codec.vocab_size:
        raise ModelError(
            f"{setup.teacher.folder}: the LM head has {rows} rows, config.json says {setup.codec.vocab_size} or more"
        )
    if config.engine.device_map is None:
        _move(model, setup.device)
    elif layer.weight.device.type == "meta":
        raise ModelError(f"{setup.teacher.folder}: the LM head does not fit on the devices: use more or larger ones")
    _check_head(setup, model)
    shared = config.engine.attention == _SHARING_ATTENTION and _may_share(model)
    if config.engine.compile:
        model.get_decoder().compile(dynamic=True)
    return HfCaptureEngine(
        model,
        setup.teacher,
        setup.settings,
        vocab_size=setup.codec.vocab_size,
        seed=config.capture.seed,
        batch_size=config.batch_size,
        workers=config.workers,
        positions=config.capture.positions,
        hidden_positions=config.capture.hidden_positions if config.capture.hidden else None,
        shared_prompts=shared,
    )


def describe(engine: TeacherEngineConfig, capture: CaptureConfig) -> dict[str, Any]:
    """The settings that change the arithmetic; see `registry.EngineModule`."""
    described: dict[str, Any] = {}
    if engine.attention != "sdpa":
        described["attention"] = engine.attention
    if engine.compile:  # fuses operations between which a model in half precision would round
        described["compile"] = True
    return described


def gpus(vllm: VllmSettings) -> int:
    """One: more need a `device_map`."""
    return 1


def _load_settings(setup: CaptureSetup, config: CacheTeacherConfig) -> dict[str, Any]:
    """What `from_pretrained` is told. Errors: `ConfigError` for a package that is missing."""
    attention, device_map = config.engine.attention, config.engine.device_map
    if attention == "flash_attention_2":
        if importlib.util.find_spec("flash_attn") is None:
            raise ConfigError("engine.attention is 'flash_attention_2', which needs the package flash-attn: install it")
        if setup.dtype == torch.float32 or not setup.device.startswith("cuda"):
            raise ConfigError(
                "engine.attention is 'flash_attention_2', which needs a GPU and dtype=bfloat16 or float16: use sdpa"
            )
    if device_map is not None and importlib.util.find_spec("accelerate") is None:
        raise ConfigError(
            f"engine.device_map is '{device_map}', which needs the package accelerate: "
            "pip install llavamod-offline[device-map]"
        )
    settings: dict[str, Any] = {"attn_implementation": attention}
    return settings if device_map is None else {**settings, "device_map": device_map}


def _move(model: Any, device: str) -> None:
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that is not there
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"device '{device}': cannot be used: {reason}: set device=cpu or cuda") from error


@torch.inference_mode()
def _check_head(setup: CaptureSetup, model: Any) -> None:
    """Refuse a model whose logits are scaled or capped after its head. Errors: `ModelError`."""
    layer, image = model.get_output_embeddings(), setup.teacher.image_token_id
    ids = [number for number in range(setup.codec.vocab_size) if number != image][:8]
    input_ids = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
    theirs = model(input_ids=input_ids, use_cache=False).logits[0, :, : setup.codec.vocab_size].float()
    head = LmHead(layer.weight, getattr(layer, "bias", None), setup.codec.vocab_size)
    hidden = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    ours = head.logits(hidden[0].to(head.device)).to(theirs.device)
    if not bool(theirs.isfinite().all()):
        return  # each sequence is looked at when it is captured
    rounding = 1e-4 if setup.dtype == torch.float32 else 2e-2
    if float((theirs - ours).abs().max()) > rounding * float(theirs.abs().max()):
        raise ModelError(
            f"{setup.teacher.folder}: the model scales or caps the logits of its LM head: choose another teacher"
        )


def _may_share(model: Any) -> bool:
    """Whether positions and a mask are all that tells the decoder what a token follows."""
    decoder = model.get_decoder()
    kinds = getattr(decoder.config, "layer_types", None) or ["full_attention"]
    window = (
        getattr(decoder.config, "sliding_window", None) if not getattr(decoder.config, "layer_types", None) else None
    )
    return hasattr(decoder, "rotary_emb") and set(kinds) == {"full_attention"} and window is None
