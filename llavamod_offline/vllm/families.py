"""Which families vLLM runs as transformers does."""

from __future__ import annotations

from llavamod_offline.errors import ConfigError
from llavamod_offline.families.protocol import Family, FeatureFamily
from llavamod_offline.models.checkpoint import read_json
from llavamod_offline.models.loading.adapter import adapter_files

# Those that run by their own processors, and have the records of transformers in tests.
EQUAL = ("idefics3", "llava_next", "smolvlm")
# And what keeps others from it, on every device or on a CPU.
_REASONS = dict.fromkeys(("glm4v", "qwen3_vl"), "its numbers there differ from those of transformers")
_CPU_REASONS = dict.fromkeys(("qwen3_5", "qwen3_5_moe"), "its linear attention needs bfloat16 on a CPU")


def check_family(family: Family, *, device: str) -> None:
    """Refuse a checkpoint that vLLM cannot run, or of which nobody knows whether it gives the same numbers there.

    Errors: `ConfigError` with the reason.
    """
    kind = str(read_json(family.folder, "config.json").get("model_type"))
    if adapter_files(family.folder):
        reason: str | None = "an adapter on a base: merge it first"
    elif isinstance(family, FeatureFamily) or kind in EQUAL:
        reason = None
    else:
        on_cpu = _CPU_REASONS.get(kind) if device == "cpu" else None
        reason = on_cpu or _REASONS.get(kind, "its numbers there were not compared with those of transformers")
    if reason is not None:
        raise ConfigError(f"{family.folder}: no {kind} by vLLM: {reason}: set the engine to hf (engine.kind=hf)")
