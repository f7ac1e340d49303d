"""Upcycling: turn a LLaVA's dense text model into a mixture of experts that initially computes the same function.

Each expert of a sparse layer starts as a copy of the dense MLP and the weights of the chosen experts sum to 1, so the
output stays the same until training makes the experts differ. The result is a standard transformers model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llavamod_offline.errors import ModelError
from llavamod_offline.models.checkpoint import load_tensors
from llavamod_offline.models.language_models import LANGUAGE_MODELS, MOE_TYPES, NAMES

LayerChoice = str | Sequence[int]


def upcycle(
    model: LlavaForConditionalGeneration,
    *,
    layers: LayerChoice,
    num_experts: int,
    top_k: int,
    seed: int,
    residual: bool = False,
) -> LlavaForConditionalGeneration:
    """Make a sparse copy of a dense student; the two share no memory.

    `layers`: see `sparse_layers`. `residual` also keeps the dense MLP as a shared expert that every token uses: its
    gate starts at σ(0) = ½ and the experts' outputs are halved, so that the sum equals the dense output. Routers are
    initialised from `seed` as `nn.Linear` does (uniform within ±1/√D).
    Errors: `ModelError` if the text model is not a dense one of `LANGUAGE_MODELS`, or an argument is out of range.
    """
    text = model.config.text_config
    if text.model_type in MOE_TYPES:
        raise ModelError("the checkpoint is sparse already: set student.upcycle to null")
    if text.model_type not in LANGUAGE_MODELS:
        raise ModelError(f"a '{text.model_type}' text model cannot be made sparse: use one of {NAMES}")
    if residual and not LANGUAGE_MODELS[text.model_type].shared_expert:
        raise ModelError(
            f"residual: the sparse form of '{text.model_type}' has no shared expert: "
            "set student.upcycle.residual to false"
        )
    if not 1 <= top_k <= num_experts:
        raise ModelError(f"top_k is {top_k} with {num_experts} experts: expected 1 ≤ top_k ≤ num_experts")
    chosen = sparse_layers(layers, text.num_hidden_layers)
    config = _sparse_config(model.config, chosen, num_experts, top_k, residual)
    tensors = _sparse_tensors(model, chosen, config.text_config, seed, residual)
    sparse = load_tensors(LlavaForConditionalGeneration, config, tensors, dtype=model.dtype)
    sparse.generation_config = model.generation_config
    return sparse.train(model.training)


def sparse_layers(choice: LayerChoice, layers: int) -> list[int]:
    """The indices of the layers to make sparse, ascending.

    `choice`: `sparse` (every second layer, from 0), `first_half`, `second_half`, `dense` (all layers) or the indices.
    Errors: `ModelError` for an unknown name, an index out of range, or an empty choice.
    """
    named: dict[str, list[int]] = {
        "sparse": list(range(0, layers, 2)),
        "first_half": list(range(layers // 2)),
        "second_half": list(range(layers // 2, layers)),
        "dense": list(range(layers)),
    }
    if isinstance(choice, str):
        if choice not in named:
            raise ModelError(f"layers '{choice}' is unknown: choose one of {', '.join(named)}, or a list of indices")
        chosen = named[choice]
    else:
        chosen = sorted(set(choice))
        wrong = [index for index in chosen if not 0 <= index < layers]
        if wrong:
            raise ModelError(f"layer {wrong[0]} does not exist: the text model has layers 0 to {layers - 1}")
    if not chosen:
        raise ModelError(f"layers '{choice}' selects none of the text model's {layers} layers: choose others")
    return chosen


def total_parameters(model: LlavaForConditionalGeneration) -> int:
    """The number of parameters, counting tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def activated_parameters(model: LlavaForConditionalGeneration) -> int:
    """The number of parameters used per token: all except the experts not chosen. Equals the total if dense."""
    text = model.config.text_config
    experts: int = sum(parameter.numel() for name, parameter in model.named_parameters() if ".mlp.experts." in name)
    if not experts:
        return total_parameters(model)
    return total_parameters(model) - experts + experts * int(text.num_experts_per_tok) // int(text.num_experts)


def _sparse_config(dense: LlavaConfig, chosen: list[int], num_experts: int, top_k: int, residual: bool) -> LlavaConfig:
    settings = dense.text_config.to_dict()
    for key in ("model_type", "architectures", "transformers_version"):
        settings.pop(key, None)
    settings |= {
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": True,
        "moe_intermediate_size": settings["intermediate_size"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(settings["num_hidden_layers"]) if i not in chosen],
        "router_aux_loss_coef": 0.0,  # the training loop adds the balance loss
        "output_router_logits": False,
    }
    language_model = LANGUAGE_MODELS[dense.text_config.model_type]
    if language_model.shared_expert:
        settings["shared_expert_intermediate_size"] = settings["intermediate_size"] if residual else 0
    text = language_model.moe_config(**settings)
    whole = dense.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "text_config"):
        whole.pop(key, None)
    return LlavaConfig(**whole, text_config=text.to_dict())


def _sparse_tensors(
    model: LlavaForConditionalGeneration, chosen: list[int], text: Any, seed: int, residual: bool
) -> dict[str, Tensor]:
    """Copies of the dense model's tensors, named and arranged as in the sparse model."""
    dense = model.state_dict()
    generator = torch.Generator().manual_seed(seed)
    prefixes = [f"model.language_model.layers.{index}.mlp" for index in chosen]
    replaced = {f"{prefix}.{name}_proj.weight" for prefix in prefixes for name in ("gate", "up", "down")}
    tensors = {name: tensor.detach().clone() for name, tensor in dense.items() if name not in replaced}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for prefix in prefixes:
        gate, up, down = (dense[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        bound = 1 / math.sqrt(text.hidden_size)
        router = torch.empty(text.num_experts, text.hidden_size).uniform_(-bound, bound, generator=generator)
        tensors[f"{prefix}.gate.weight"] = router.to(gate)
        tensors[f"{prefix}.experts.gate_up_proj"] = torch.cat([gate, up]).repeat(text.num_experts, 1, 1)
        tensors[f"{prefix}.experts.down_proj"] = (down / 2 if residual else down).repeat(text.num_experts, 1, 1)
        if not LANGUAGE_MODELS[model.config.text_config.model_type].shared_expert:
            continue
        rows = text.shared_expert_intermediate_size
        tensors[f"{prefix}.shared_expert.gate_proj.weight"] = gate[:rows].clone()
        tensors[f"{prefix}.shared_expert.up_proj.weight"] = up[:rows].clone()
        tensors[f"{prefix}.shared_expert.down_proj.weight"] = down[:, :rows].clone()
        tensors[f"{prefix}.shared_expert_gate.weight"] = gate.new_zeros(1, text.hidden_size)
    return tensors
