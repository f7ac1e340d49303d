"""Which mixture-of-experts model of transformers can compute what a dense text model does, and how it names its parts.

To support another one, add an entry to `TWINS`. `upcycle` compares the two models at the end, so anything that an entry
overlooks is refused.

Shape suffixes: S tokens in a row, E experts, K choices per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from llavamod_offline.errors import ModelError


@dataclass(frozen=True)
class SparseTwin:
    """The sparse form of a dense text model.

    `model_type` is that of its configuration, `whole_type` that of the whole model's, if it has one of its own;
    `router` the class of its routers. Settings: `experts` is the number of experts, `width` the size of one. `block`
    names the part of a layer that holds `gate` (the router) and the experts. `every_layer`: all layers are sparse.
    `shared_expert`: it has one, to which `residual` upcycling copies the dense MLP. `needs`: values of the dense
    configuration without which the two compute different functions; `sets`: further settings of the sparse one.
    """

    model_type: str
    router: str
    whole_type: str | None = None
    experts: str = "num_experts"
    width: str = "moe_intermediate_size"
    block: str = "mlp"
    gate: str = "gate"
    every_layer: bool = False
    shared_expert: bool = False
    needs: Mapping[str, Any] = field(default_factory=dict)
    sets: Mapping[str, Any] = field(default_factory=dict)


_LOCAL: dict[str, Any] = {"experts": "num_local_experts", "width": "intermediate_size", "every_layer": True}
_LISTED: dict[str, Any] = {"norm_topk_prob": True, "decoder_sparse_step": 1}
_MIXTRAL: dict[str, Any] = {"router": "MixtralTopKRouter", **_LOCAL}

# By the `model_type` of the dense text model's configuration.
TWINS = {
    "qwen2": SparseTwin("qwen2_moe", "Qwen2MoeTopKRouter", shared_expert=True, sets=_LISTED),
    # Qwen3-MoE has one window for all layers, Qwen3 one for each.
    "qwen3": SparseTwin("qwen3_moe", "Qwen3MoeTopKRouter", needs={"use_sliding_window": False}, sets=_LISTED),
    "qwen3_vl_text": SparseTwin(
        "qwen3_vl_moe_text", "Qwen3VLMoeTextTopKRouter", "qwen3_vl_moe", sets={"decoder_sparse_step": 1}
    ),
    "qwen3_5_text": SparseTwin(
        "qwen3_5_moe_text", "Qwen3_5MoeTopKRouter", "qwen3_5_moe", every_layer=True, shared_expert=True
    ),
    "mistral": SparseTwin("mixtral", **_MIXTRAL),
    "llama": SparseTwin(
        "mixtral",
        needs={"attention_bias": False, "mlp_bias": False},
        sets={"sliding_window": None},
        **_MIXTRAL,
    ),
    # OLMoE normalises before its layers, OLMo 2 after them, as FlexOlmo does.
    "olmo2": SparseTwin(
        "flex_olmo",
        "FlexOlmoTopKRouter",
        width="intermediate_size",
        every_layer=True,
        sets={"norm_topk_prob": True},
    ),
    "granite": SparseTwin(
        "granitemoe",
        "GraniteMoeTopKRouter",
        block="block_sparse_moe",
        gate="router",
        needs={"mlp_bias": False},
        **_LOCAL,
    ),
}
SPARSE_TYPES = {twin.model_type: twin for twin in TWINS.values()}
_ROUTERS = {twin.router for twin in TWINS.values()}


def sparse_twin(text_config: Any) -> SparseTwin:
    """The twin of a dense text model. Errors: `ModelError` if there is none, or none that computes the same."""
    twin = TWINS.get(text_config.model_type)
    if twin is None:
        raise ModelError(
            f"a '{text_config.model_type}' text model cannot be made sparse: transformers has no mixture of experts "
            f"that computes the same: use one of {', '.join(TWINS)}"
        )
    for name, value in twin.needs.items():
        if getattr(text_config, name, value) != value:
            raise ModelError(
                f"a '{text_config.model_type}' text model with {name}={getattr(text_config, name)} cannot be made "
                f"sparse: its sparse form, {twin.model_type}, does not support this: use another checkpoint"
            )
    return twin


def is_router(module: nn.Module) -> bool:
    """Whether a module is the router of a known mixture of experts."""
    return type(module).__name__ in _ROUTERS


def always_normalises(router: Any) -> bool:
    """Whether the weights of a router's choices sum to 1."""
    return bool(getattr(router, "norm_topk_prob", True))


def routed(output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [S, E], weights [S, K] and choices [S, K] of a router's output; Granite's has them in reverse."""
    return output if output[0].is_floating_point() else output[::-1]


def rerouted(
    output: tuple[Tensor, Tensor, Tensor], weights_SK: Tensor, choices_SK: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A router's output with other weights and choices, in its own order."""
    if output[0].is_floating_point():
        return output[0], weights_SK, choices_SK
    return choices_SK, weights_SK, output[2]
