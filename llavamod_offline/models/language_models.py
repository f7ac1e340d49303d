"""The language models that a student can be built on, each with the mixture-of-experts model it can be upcycled to.

To support another one, add an entry to `LANGUAGE_MODELS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import Qwen2ForCausalLM, Qwen2MoeConfig, Qwen3ForCausalLM, Qwen3MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter


@dataclass(frozen=True)
class LanguageModel:
    """A dense model's class in transformers, and the configuration and router classes of its mixture-of-experts twin.

    `names` are the releases of this architecture. The router returns logits [S, E], weights [S, K] and choices [S, K].
    `shared_expert`: whether the twin has a shared expert, to which `residual` upcycling copies the dense MLP.
    """

    names: str
    dense: Any
    moe_config: Any
    router: type[Any]
    shared_expert: bool


# By the `model_type` of the dense model.
LANGUAGE_MODELS = {
    "qwen2": LanguageModel("Qwen1.5, Qwen2, Qwen2.5", Qwen2ForCausalLM, Qwen2MoeConfig, Qwen2MoeTopKRouter, True),
    "qwen3": LanguageModel("Qwen3", Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeTopKRouter, False),
}
NAMES = ", ".join(model.names for model in LANGUAGE_MODELS.values())
MOE_TYPES = tuple(model.moe_config.model_type for model in LANGUAGE_MODELS.values())
ROUTERS = tuple(model.router for model in LANGUAGE_MODELS.values())
