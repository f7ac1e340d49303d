"""Loading a teacher for the Hugging Face engine: devices, attention, compilation, and checks of the loaded model."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from llavamod_offline.errors import ConfigError, ModelError
from llavamod_offline.families.run import check_model
from llavamod_offline.models.lm_head import lm_head_of
from teacher_cache.engines.hf import HfCaptureEngine

if TYPE_CHECKING:
    from teacher_cache.capture_setup import CaptureSetup, SetupValues


def load_engine(setup: CaptureSetup) -> HfCaptureEngine:
    """Load the weights onto the device, or the devices.

    Errors: `ModelError` if they do not fit config.json, or its logits are not those of its LM head;
    `ConfigError` for a missing device or package.
    """
    placement = _load_settings(setup)
    images = setup.image_pool()
    images.begin()  # while the weights are loaded
    model = setup.teacher.load(setup.dtype, **placement)
    head = lm_head_of(model)
    rows, vocab_size = head.rows, setup.codec.vocab_size
    if rows < vocab_size:
        raise ModelError(
            f"{setup.teacher.folder}: the LM head has {rows} rows, config.json says {vocab_size} or more: "
            "download it again"
        )
    if setup.device_map is None:
        model.to(setup.device)
    elif head.weight_VD.device.type == "meta":
        raise ModelError(f"{setup.teacher.folder}: the LM head does not fit on the devices: use more or larger ones")
    check_model(setup.teacher, model)
    shared = setup.attention == "sdpa" and _may_share(model)
    if setup.compile:
        model.get_decoder().compile(dynamic=True)
    return HfCaptureEngine(
        model,
        setup.teacher,
        setup.settings,
        vocab_size=vocab_size,
        seed=setup.seed,
        batch_size=setup.batch_size,
        images=images,
        positions=setup.positions,
        hidden_positions=setup.hidden_positions,
        shared_prompts=shared,
    )


def describe(given: SetupValues) -> dict[str, Any]:
    """The settings that change the arithmetic; see `registry.describe_engine`."""
    attention = {} if given["attention"] == "sdpa" else {"attention": given["attention"]}
    # Compiling fuses operations between which a model in half precision would round.
    return {**attention, "compile": True} if given["compile"] else attention


def _load_settings(setup: CaptureSetup) -> dict[str, Any]:
    """Arguments of `from_pretrained`. Errors: `ConfigError` for attention or a device map that cannot work here."""
    if setup.attention == "flash_attention_2":
        if importlib.util.find_spec("flash_attn") is None:
            raise ConfigError(
                "engine.attention is 'flash_attention_2', which needs the package flash-attn: "
                "pip install flash-attn, or set engine.attention=sdpa"
            )
        if setup.dtype == torch.float32 or not setup.device.startswith("cuda"):
            raise ConfigError(
                "engine.attention is 'flash_attention_2', which needs a GPU and dtype=bfloat16 or float16: use sdpa"
            )
    if setup.device_map is not None and importlib.util.find_spec("accelerate") is None:
        raise ConfigError(
            f"engine.device_map is '{setup.device_map}', which needs the package accelerate: "
            "pip install 'llavamod-offline[device-map]', or set engine.device_map=null"
        )
    placement = {} if setup.device_map is None else {"device_map": setup.device_map}
    return {"attn_implementation": setup.attention, **placement}


def _may_share(model: Any) -> bool:
    """Whether positions and mask alone tell the decoder what a token follows."""
    decoder = model.get_decoder()
    kinds = getattr(decoder.config, "layer_types", None)
    full = set(kinds) == {"full_attention"} if kinds else getattr(decoder.config, "sliding_window", None) is None
    return full and hasattr(decoder, "rotary_emb")
