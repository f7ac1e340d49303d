"""Dense to sparse: a LLaVA whose text model becomes a mixture of experts that computes the same function at first.

A Qwen2 becomes a Qwen2Moe, a Qwen3 a Qwen3Moe, which differs in that it has no place for a shared expert.

Every expert of a sparse layer starts as a copy of the dense MLP, and the weights of the chosen experts sum to 1, so the
output does not change until training moves the experts apart. The result is a standard transformers model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2MoeConfig, Qwen3MoeConfig

from llavamod_offline.errors import ModelError
from llavamod_offline.models.checkpoint import load_tensors

LayerChoice = str | Sequence[int]
SPARSE_TYPES = ("qwen2_moe", "qwen3_moe")


def upcycle(
    model: LlavaForConditionalGeneration,
    *,
    layers: LayerChoice,
    num_experts: int,
    top_k: int,
    seed: int,
    residual: bool = False,
) -> LlavaForConditionalGeneration:
    """Make a sparse student of a dense one; the dense model is left as it is and shares no memory with the result.

    `layers`: see `sparse_layers`. `residual` keeps the dense MLP as a shared expert that is always on: its gate starts
    at σ(0) = ½ and the experts' outputs are halved, so that the sum is the dense output again. Routers start as
    `nn.Linear` does (uniform within ±1/√D), from `seed`.
    Errors: `ModelError` if the text model is no dense Qwen2 or Qwen3, or the numbers do not fit.
    """
    text = model.config.text_config
    if text.model_type in SPARSE_TYPES:
        raise ModelError("the checkpoint is sparse already: set student.upcycle to null")
    if text.model_type not in ("qwen2", "qwen3"):
        raise ModelError(
            f"cannot make a '{text.model_type}' text model sparse: use a Qwen1.5, Qwen2, Qwen2.5 or Qwen3 model"
        )
    if residual and text.model_type == "qwen3":
        raise ModelError(
            "residual: a sparse Qwen3 has no shared expert: set student.upcycle.residual to false, or use a Qwen2"
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
    """The indices of the layers that become sparse, rising.

    `sparse`: every second one, from 0 · `first_half` · `second_half` · `dense`: all of them · or their indices.
    Errors: `ModelError` for another name, an index that is no layer, or none at all.
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
        raise ModelError(f"layers '{choice}' leaves no layer sparse in a text model of {layers}: choose others")
    return chosen


def total_parameters(model: LlavaForConditionalGeneration) -> int:
    """All parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def activated_parameters(model: LlavaForConditionalGeneration) -> int:
    """The parameters a token passes: all but the experts that its router leaves out. Equals the total if dense."""
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
        "router_aux_loss_coef": 0.0,  # the balance loss is added by the training loop alone
        "output_router_logits": False,
    }
    text: Qwen2MoeConfig | Qwen3MoeConfig
    if dense.text_config.model_type == "qwen3":
        text = Qwen3MoeConfig(**settings)
    else:
        rows = settings["intermediate_size"] if residual else 0
        text = Qwen2MoeConfig(**settings, shared_expert_intermediate_size=rows)
    whole = dense.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "text_config"):
        whole.pop(key, None)
    return LlavaConfig(**whole, text_config=text.to_dict())


def _sparse_tensors(
    model: LlavaForConditionalGeneration,
    chosen: list[int],
    text: Qwen2MoeConfig | Qwen3MoeConfig,
    seed: int,
    residual: bool,
) -> dict[str, Tensor]:
    """The tensors of the sparse model by name, all of them copies."""
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
        if isinstance(text, Qwen3MoeConfig):
            continue
        rows = text.shared_expert_intermediate_size
        tensors[f"{prefix}.shared_expert.gate_proj.weight"] = gate[:rows].clone()
        tensors[f"{prefix}.shared_expert.up_proj.weight"] = up[:rows].clone()
        tensors[f"{prefix}.shared_expert.down_proj.weight"] = down[:, :rows].clone()
        tensors[f"{prefix}.shared_expert_gate.weight"] = gate.new_zeros(1, text.hidden_size)
    return tensors
