"""Override settings that vLLM takes from config.json, unlike transformers, with what transformers computes.

Rotary positions in three dimensions: transformers' classes decide whether these are interleaved, and what a missing key
means. Other settings are fixed in transformers' classes and need not be in config.json at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llavamod_offline.families.folder import read_config

# By the text model's type: `rope_parameters` if config.json lacks them, and those that apply whatever it says.
_QWEN2_ROPE = ({"mrope_section": [16, 24, 24]}, {"mrope_interleaved": False})
_QWEN3_ROPE = ({"mrope_section": [24, 20, 20]}, {"mrope_interleaved": True})
_GLM_ROPE = ({"mrope_section": [8, 12, 12], "partial_rotary_factor": 1.0}, {"mrope_interleaved": False})
_ROPE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl_text": _QWEN2_ROPE,
    "qwen2_5_vl_text": _QWEN2_ROPE,
    "qwen3_vl_text": _QWEN3_ROPE,
    "qwen3_vl_moe_text": _QWEN3_ROPE,
    "glm4v_text": _GLM_ROPE,
}
_SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3_vl_moe_text": {"norm_topk_prob": True},
    "glm4v_text": {"attention_bias": True},
}


def config_overrides(folder: Path) -> dict[str, Any]:
    """What to override in vLLM's configuration of a checkpoint."""
    from transformers import AutoConfig

    config = read_config(AutoConfig, folder)
    text = config.get_text_config()
    found = dict(_SETTINGS.get(text.model_type, {}))
    if text.model_type in _ROPE:
        missing, fixed = _ROPE[text.model_type]
        found["rope_parameters"] = missing | dict(text.rope_parameters) | fixed
    if not found:
        return {}
    return found if text is config else {"text_config": found}
