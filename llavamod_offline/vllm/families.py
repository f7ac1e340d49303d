"""Which families vLLM runs as transformers does."""

from __future__ import annotations

from llavamod_offline.errors import ConfigError
from llavamod_offline.families.protocol import Family, FeatureFamily
from llavamod_offline.models.checkpoint import read_json
from llavamod_offline.models.loading.adapter import adapter_files

# Types that run by their own processors, with the same records as transformers in tests; "llava" with a Pixtral tower.
EQUAL = (
    *("cohere2_vision", "glm4v", "idefics3", "internvl", "llava", "llava_next", "mistral3"),
    *("qwen3_vl", "qwen3_vl_moe", "smolvlm"),
)
# Why others cannot in vLLM 0.32, on every device or on a CPU; this also applies to plain language models.
_REASONS = {
    **dict.fromkeys(("aya_vision", "glm46v", "lighton_ocr"), "vLLM 0.32 has no model of this type"),
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm2_vl"), "its numbers there differ from those of transformers by a nat"),
}
_CPU_REASONS = {
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), "its linear attention needs bfloat16 on a CPU"),
    **dict.fromkeys(
        ("gemma3", "paligemma"),
        "its image tokens see one another, and vLLM's CPUPlatform.get_attn_backend_cls chooses attention without that",
    ),
}


def check_family(family: Family, *, device: str) -> None:
    """Refuse a checkpoint that vLLM cannot run, or that is not known to give the same numbers there.

    Errors: `ConfigError` with the reason.
    """
    kind = str(read_json(family.folder, "config.json").get("model_type"))
    reason = _REASONS.get(kind) or (_CPU_REASONS.get(kind) if device == "cpu" else None)
    if adapter_files(family.folder):
        reason = "an adapter on a base: merge it first"
    elif reason is None and not isinstance(family, FeatureFamily) and kind not in EQUAL:
        reason = "its numbers there were not compared with those of transformers"
    if reason is not None:
        raise ConfigError(f"{family.folder}: no {kind} by vLLM: {reason}: set the engine to hf (engine.kind=hf)")
