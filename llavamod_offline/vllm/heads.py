"""Whether vLLM's logits are those of transformers."""

from __future__ import annotations

from pathlib import Path

from llavamod_offline.errors import ConfigError
from llavamod_offline.families.folder import read_config
from llavamod_offline.models.lm_head import head_settings


def check_same_head(folder: Path) -> None:
    """Refuse a model whose own class omits what its text model's class does to logits: vLLM does it anyway.

    transformers' LLaVA over Gemma 2 gives logits without the softcap, and its Aya Vision without the scale; vLLM runs
    their text models unchanged. Errors: `ConfigError`.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = read_config(AutoConfig, folder)
    text, own = config.get_text_config(), config.architectures or []
    alone = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text.model_type, "")
    (cap, scale), (text_cap, text_scale) = head_settings(own, config), head_settings([str(alone)], config)
    if text is not config and (cap, scale) != (text_cap, text_scale):
        raise ConfigError(
            f"{folder}: vLLM gives logits with the text model's softcap ({text_cap or 'none'}) and scale "
            f"({text_scale:g}), {', '.join(own)} of transformers with softcap {cap or 'none'} and scale {scale:g}: set "
            "engine.kind=hf"
        )
