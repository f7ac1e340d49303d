"""Upcycling: turn a student's dense text model into a mixture of experts that initially computes the same function.

Each expert of a sparse layer starts as a copy of the dense MLP and the weights of the chosen experts sum to 1, so the
output stays the same until training makes the experts differ. The result is a standard transformers model.

Shape suffixes: E experts, D hidden size, I the width of one expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llavamod_offline.errors import ModelError
from llavamod_offline.models.checkpoint import load_tensors
from llavamod_offline.models.lm_head import evaluating, plain_ids
from llavamod_offline.models.sparse_twins import SPARSE_TYPES, SparseTwin, sparse_twin

LayerChoice = str | Sequence[int]
_PROBED = 24  # tokens


def upcycle(
    model: Any,
    *,
    layers: LayerChoice,
    num_experts: int | Sequence[int],
    top_k: int,
    seed: int,
    residual: bool = False,
    expert_noise: float = 0.0,
) -> Any:
    """Make a sparse copy of a dense student; the two share no memory.

    `layers`: see `sparse_layers`; `num_experts`: of each sparse layer, or one number for all. `residual` also keeps the
    dense MLP as a shared expert that every token uses: its gate starts at σ(0) = ½ and the experts' outputs are halved,
    so that the sum equals the dense output. Routers are initialised from `seed` as `nn.Linear` does (uniform within
    ±1/√D). `expert_noise` adds to each expert's matrices normal noise of this many times their own standard deviation,
    so that copies begin to differ; the output is then only near the dense one.
    Errors: `ModelError` if the text model has no sparse twin that computes the same, or an argument is out of range.
    """
    text = model.config.get_text_config()
    if text.model_type in SPARSE_TYPES:
        raise ModelError("the checkpoint is sparse already: set student.upcycle to null")
    twin = sparse_twin(text)
    if residual and not twin.shared_expert:
        raise ModelError(
            f"residual: the sparse form of '{text.model_type}' has no shared expert: "
            "set student.upcycle.residual to false"
        )
    if expert_noise < 0:
        raise ModelError(f"expert_noise is {expert_noise:g}: must be 0 or more")
    chosen = sparse_layers(layers, text.num_hidden_layers)
    if twin.every_layer and len(chosen) < text.num_hidden_layers:
        raise ModelError(
            f"layers: {twin.model_type}, the sparse form of '{text.model_type}', has experts in every layer: set "
            "student.upcycle.layers to dense"
        )
    experts = experts_per_layer(num_experts, len(chosen))
    if not 1 <= top_k <= experts:
        raise ModelError(f"top_k is {top_k} with {experts} experts: expected 1 ≤ top_k ≤ num_experts")
    config = _sparse_config(model.config, twin, chosen, experts, top_k, residual)
    tensors = _sparse_tensors(model, twin, chosen, experts, residual, torch.Generator().manual_seed(seed))
    sparse = load_tensors(_model_class(model, config), config, tensors, dtype=model.dtype)
    _check_equal(model, sparse, twin)
    if expert_noise:
        _differ(sparse, twin, expert_noise, torch.Generator().manual_seed(seed + 1))
    sparse.generation_config = model.generation_config
    return sparse.train(model.training)


def experts_per_layer(num_experts: int | Sequence[int], layers: int) -> int:
    """The number of experts in each of this many sparse layers.

    Errors: `ModelError` for a list of another length, or of different numbers, which no checkpoint of transformers can
    have.
    """
    if isinstance(num_experts, int):
        return num_experts
    numbers = list(num_experts)
    if len(numbers) not in (1, layers):
        raise ModelError(
            f"num_experts lists {len(numbers)} numbers for {layers} sparse layers: give one for each, or one for all"
        )
    if len(set(numbers)) > 1:
        raise ModelError(
            f"num_experts is {numbers}: the layers of a transformers checkpoint have the same number of experts: give "
            "the same for each"
        )
    return numbers[0]


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


def total_parameters(model: Any) -> int:
    """The number of parameters, counting tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def activated_parameters(model: Any) -> int:
    """The number of parameters used per token: all except the experts not chosen. Equals the total if dense."""
    text = model.config.get_text_config()
    twin = SPARSE_TYPES.get(text.model_type)
    if twin is None:
        return total_parameters(model)
    part = f".{twin.block}.experts."
    experts: int = sum(parameter.numel() for name, parameter in model.named_parameters() if part in name)
    chosen, every = int(text.num_experts_per_tok), int(getattr(text, twin.experts))
    return total_parameters(model) - experts + experts * chosen // every


def _sparse_config(dense: Any, twin: SparseTwin, chosen: list[int], experts: int, top_k: int, residual: bool) -> Any:
    from transformers import AutoConfig

    text = dense.get_text_config()
    settings = _settings(text) | {
        twin.experts: experts,
        "num_experts_per_tok": top_k,
        twin.width: text.intermediate_size,
        "router_aux_loss_coef": 0.0,  # the training loop adds the balance loss
        "output_router_logits": False,
        **twin.sets,
    }
    if not twin.every_layer:
        settings["mlp_only_layers"] = [index for index in range(text.num_hidden_layers) if index not in chosen]
    if twin.shared_expert:
        settings["shared_expert_intermediate_size"] = text.intermediate_size if residual else 0
    sparse = AutoConfig.for_model(twin.model_type, **settings)
    if text is dense:
        return sparse
    whole = {**_settings(dense), "text_config": sparse.to_dict()}
    return AutoConfig.for_model(twin.whole_type or dense.model_type, **whole)


def _settings(config: Any) -> dict[str, Any]:
    settings: dict[str, Any] = config.to_dict()
    for key in ("model_type", "architectures", "transformers_version"):
        settings.pop(key, None)
    return settings


def _model_class(model: Any, config: Any) -> Any:
    """The class of the sparse model: that of the dense one, unless its twin has a class of its own."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if type(config) is type(model.config):
        return type(model)
    auto = AutoModelForCausalLM if config.get_text_config() is config else AutoModelForImageTextToText
    return auto._model_mapping[type(config)]


def _sparse_tensors(
    model: Any, twin: SparseTwin, chosen: list[int], experts: int, residual: bool, generator: torch.Generator
) -> dict[str, Tensor]:
    """Copies of the dense model's tensors, named and arranged as in the sparse model."""
    dense = model.state_dict()
    names = {module: name for name, module in model.named_modules()}
    layers = [f"{names[model.get_decoder()]}.layers.{index}" for index in chosen]
    replaced = {f"{layer}.mlp.{name}_proj.weight" for layer in layers for name in ("gate", "up", "down")}
    tensors = {name: tensor.detach().clone() for name, tensor in dense.items() if name not in replaced}
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        del tensors[f"{names[model.get_output_embeddings()]}.weight"]
    for layer in layers:
        gate, up, down = (dense[f"{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        prefix = f"{layer}.{twin.block}"
        size = gate.shape[1]
        bound = 1 / math.sqrt(size)
        router_ED = torch.empty(experts, size).uniform_(-bound, bound, generator=generator)
        tensors[f"{prefix}.{twin.gate}.weight"] = router_ED.to(gate)
        tensors[f"{prefix}.experts.gate_up_proj"] = torch.cat([gate, up]).repeat(experts, 1, 1)
        tensors[f"{prefix}.experts.down_proj"] = (down / 2 if residual else down).repeat(experts, 1, 1)
        if not twin.shared_expert:
            continue
        rows = len(gate) if residual else 0
        tensors[f"{prefix}.shared_expert.gate_proj.weight"] = gate[:rows].clone()
        tensors[f"{prefix}.shared_expert.up_proj.weight"] = up[:rows].clone()
        tensors[f"{prefix}.shared_expert.down_proj.weight"] = down[:, :rows].clone()
        tensors[f"{prefix}.shared_expert_gate.weight"] = gate.new_zeros(1, size)
    return tensors


@torch.no_grad()
def _check_equal(dense: Any, sparse: Any, twin: SparseTwin) -> None:
    """Compare the logits of both models on a few tokens. Errors: `ModelError`."""
    ids_BT = torch.tensor([plain_ids(dense, _PROBED)], device=dense.get_input_embeddings().weight.device)
    with evaluating(dense), evaluating(sparse):
        before_TV, after_TV = (model(input_ids=ids_BT, use_cache=False).logits[0].float() for model in (dense, sparse))
    gap, most = float((before_TV - after_TV).abs().max()), float(before_TV.abs().max())
    if gap > (1e-4 if dense.dtype == torch.float32 else 1e-1) * most:
        raise ModelError(
            f"a '{dense.config.get_text_config().model_type}' text model with this configuration cannot be made "
            f"sparse: {twin.model_type} computes something else (logits differ by {gap:.3g}, the largest is "
            f"{most:.3g}): use another checkpoint"
        )


@torch.no_grad()
def _differ(sparse: Any, twin: SparseTwin, noise: float, generator: torch.Generator) -> None:
    """Add normal noise to the experts' matrices, in units of each matrix's standard deviation."""
    for name, parameter in sparse.named_parameters():
        if f".{twin.block}.experts." in name:
            for matrix in parameter:  # one expert's
                drawn = torch.empty(matrix.shape, dtype=torch.float32).normal_(generator=generator)
                matrix.add_((drawn * noise).to(matrix) * matrix.std())
