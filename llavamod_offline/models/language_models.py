"""The language models that a student can be built on.

To support another one, add an entry to `LANGUAGE_MODELS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import Qwen2ForCausalLM, Qwen3ForCausalLM


@dataclass(frozen=True)
class LanguageModel:
    """A dense model's class in transformers; `names` are the releases of this architecture."""

    names: str
    dense: Any


# By the `model_type` of the dense model.
LANGUAGE_MODELS = {
    "qwen2": LanguageModel("Qwen1.5, Qwen2, Qwen2.5", Qwen2ForCausalLM),
    "qwen3": LanguageModel("Qwen3", Qwen3ForCausalLM),
}
NAMES = ", ".join(model.names for model in LANGUAGE_MODELS.values())
