"""Prune the toy teacher's language model: fewer layers, smaller hidden size, fewer LM head rows.

Keeps the largest weights, as magnitude pruning does; training must recover the rest.

Shape suffixes: D hidden size, F feed-forward size, H attention heads, V rows of the embeddings and tied LM head.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from llavamod_offline.families.llava.checkpoint import load_llava
from llavamod_offline.models.checkpoint import load_tokenizer

LAYERS = (0, 2, 3)
HIDDEN = 96
HEADS = 3
INTERMEDIATE = 256
ROWS = 608


def write_small_language_model(teacher: Path, folder: Path) -> Path:
    """Write a Qwen2 folder of 3 layers, hidden size 96 and 608 LM head rows, with the teacher's tokenizer."""
    tokenizer = load_tokenizer(teacher)
    model = narrowed(load_llava(teacher), LAYERS, hidden=HIDDEN, heads=HEADS, intermediate=INTERMEDIATE, rows=ROWS)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    # Not the model's save_pretrained, which shows a progress bar and looks for accelerators.
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    return folder


def narrowed(
    teacher: PreTrainedModel,
    layers: Sequence[int],
    *,
    hidden: int,
    heads: int,
    intermediate: int,
    rows: int,
) -> Qwen2ForCausalLM:
    """The given layers of a teacher's language model, with its strongest dimensions, attention heads and neurons.

    The teacher must have as many key-value heads as heads, and tied embeddings.
    """
    text = teacher.config.text_config
    size = text.hidden_size // text.num_attention_heads
    tensors = teacher.get_decoder().state_dict()
    embeddings_VD, norm_D = tensors["embed_tokens.weight"], tensors["norm.weight"]
    kept_D = _largest(embeddings_VD.norm(dim=0) * norm_D.abs(), hidden)
    found = {"embed_tokens.weight": embeddings_VD[:rows, kept_D], "norm.weight": norm_D[kept_D]}
    for place, layer in enumerate(layers):
        names = [name for name in tensors if name.startswith(f"layers.{layer}.")]
        part = {name.removeprefix(f"layers.{layer}."): tensors[name] for name in names}
        for name, tensor in _layer(part, kept_D, size=size, heads=heads, intermediate=intermediate).items():
            found[f"layers.{place}.{name}"] = tensor
    settings = {
        **text.to_dict(),
        "hidden_size": hidden,
        "num_hidden_layers": len(layers),
        "layer_types": None,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": size,
        "vocab_size": rows,
    }
    model = Qwen2ForCausalLM(Qwen2Config(**settings))
    model.model.load_state_dict(found)
    model.tie_weights()
    return model


def _layer(part: dict[str, Tensor], kept_D: Tensor, *, size: int, heads: int, intermediate: int) -> dict[str, Tensor]:
    """One layer's pruned tensors; `size` is that of an attention head."""
    out_DHS = part["self_attn.o_proj.weight"].unflatten(1, (-1, size))
    kept_H = _largest(out_DHS.norm(dim=(0, 2)), heads)
    attended = (kept_H[:, None] * size + torch.arange(size)).flatten()
    up_FD, gate_FD, down_DF = (part[f"mlp.{name}_proj.weight"] for name in ("up", "gate", "down"))
    kept_F = _largest(up_FD.norm(dim=1) * gate_FD.norm(dim=1) * down_DF.norm(dim=0), intermediate)
    found = {
        "self_attn.o_proj.weight": part["self_attn.o_proj.weight"][kept_D][:, attended],
        "mlp.up_proj.weight": up_FD[kept_F][:, kept_D],
        "mlp.gate_proj.weight": gate_FD[kept_F][:, kept_D],
        "mlp.down_proj.weight": down_DF[kept_D][:, kept_F],
    }
    for name in ("q", "k", "v"):
        found[f"self_attn.{name}_proj.weight"] = part[f"self_attn.{name}_proj.weight"][attended][:, kept_D]
        found[f"self_attn.{name}_proj.bias"] = part[f"self_attn.{name}_proj.bias"][attended]
    for name in ("input_layernorm", "post_attention_layernorm"):
        found[f"{name}.weight"] = part[f"{name}.weight"][kept_D]
    return found


def _largest(values: Tensor, count: int) -> Tensor:
    """The indices of the largest values, in increasing order."""
    return values.topk(count).indices.sort().values
