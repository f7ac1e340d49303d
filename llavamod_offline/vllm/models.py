"""Subclasses of vLLM's models that load checkpoints from transformers 5 and from upcycling, and check image tokens.

`OfflineX` in this module is vLLM's X, for the generating runner.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm import ModelRegistry
from vllm.model_executor.models.utils import WeightsMapper

from llavamod_offline.errors import ModelError
from llavamod_offline.vllm.inputs import TOKENS_FIELD
from llavamod_offline.vllm.plugin import PREFIX

# transformers 5 saves a CLIP or SigLIP tower without the `vision_model` level of vLLM's class.
_TOWER_PARTS = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.", "head.")
_TOWER_NAMES = WeightsMapper(
    orig_to_new_prefix={f"vision_tower.{part}": f"vision_tower.vision_model.{part}" for part in _TOWER_PARTS}
)


def __getattr__(name: str) -> type:
    if not name.startswith(PREFIX):
        raise AttributeError(name)
    return twin(vllm_model(name.removeprefix(PREFIX)), name)


def vllm_model(architecture: str) -> Any:
    """vLLM's own class of an architecture."""
    return ModelRegistry.models[architecture].load_model_cls()


def twin(base: Any, name: str, *others: Any, **body: Any) -> type:
    """A subclass of one of vLLM's model classes (and of `others`), with the attributes in `body`.

    It raises `ModelError` if an image yields a different number of tokens than our sequences hold for it.
    """

    def embed_multimodal(self: Any, **kwargs: Any) -> Any:
        expected = kwargs.pop(TOKENS_FIELD, None)
        embeddings = base.embed_multimodal(self, **kwargs)
        if expected is not None:  # None in the engine's profiling run
            _check_tokens([len(rows_TD) for rows_TD in embeddings], [int(tokens) for tokens in expected])
        return embeddings

    def load_weights(self: Any, weights: Iterable[tuple[str, Any]]) -> Any:
        config = getattr(self.config, "text_config", self.config)
        if getattr(config, "shared_expert_intermediate_size", None) == 0:  # vLLM then has no such module
            weights = ((key, tensor) for key, tensor in weights if ".mlp.shared_expert" not in key)
        if base.__name__.startswith("Qwen3VLMoe"):
            weights = _experts_as_published(weights, config)
        if hasattr(getattr(self, "vision_tower", None), "vision_model"):
            self.hf_to_vllm_mapper = getattr(base, "hf_to_vllm_mapper", WeightsMapper()) | _TOWER_NAMES
        return base.load_weights(self, weights)

    own: dict[str, Any] = {"__module__": __name__, "load_weights": load_weights, **body}
    if getattr(base, "supports_multimodal", False):
        own["embed_multimodal"] = embed_multimodal
    return type(name, (base, *others), own)


def _experts_as_published(weights: Iterable[tuple[str, Any]], config: Any) -> Iterable[tuple[str, Any]]:
    """Transpose the experts of a Qwen3-VL-MoE that transformers 5 made: vLLM expects them as Qwen published them.

    A tensor's shape tells which of the two it is, as in transformers' `Transpose` of its `conversion_mapping`.
    """
    rows = {"gate_up_proj": 2 * config.moe_intermediate_size, "down_proj": config.hidden_size}
    for key, tensor in weights:
        module, _, name = key.rpartition(".")
        ours = module.endswith(".experts") and tensor.shape[1] == rows.get(name)
        yield key, tensor.transpose(1, 2).contiguous() if ours else tensor


def _check_tokens(made: list[int], expected: list[int]) -> None:
    if made != expected:
        raise ModelError(
            f"vLLM makes {made} tokens from images that take {expected} in our sequences: it reads the checkpoint's "
            "configuration differently: use the engine hf"
        )
