"""The vision towers that a LLaVA model may have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llavamod_offline.errors import ModelError

if TYPE_CHECKING:
    from transformers import LlavaConfig

# The class tokens of each kind, by its model_type.
_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0, "dinov2": 1, "dinov2_with_registers": 1}
TOWER_TYPES = tuple(_CLASS_TOKENS)


def extra_tokens(config: LlavaConfig) -> int:
    """The number of a vision tower's tokens that are not patches: class and register tokens. Errors: `ModelError`."""
    kind = config.vision_config.model_type
    if kind not in _CLASS_TOKENS:
        raise ModelError(
            f"config.json: the vision tower is of type '{kind}', which is none of {', '.join(_CLASS_TOKENS)}: use a "
            "LLaVA with one of these"
        )
    return _CLASS_TOKENS[kind] + int(getattr(config.vision_config, "num_register_tokens", 0))
