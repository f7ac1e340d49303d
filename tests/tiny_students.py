"""Tiny language models and vision towers of many kinds, made on the spot, to build students from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
)

from tests.tiny import IMAGE_SIZE, PATCH_SIZE, tiny_tokenizer, write_image_processor

# Released models that stand for their kind, with the `model_type` and the settings that its configuration needs.
TEXT_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "Qwen3": ("qwen3", {"head_dim": 32}),
    "Llama": ("llama", {}),
    "SmolLM2": ("llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
    "SmolLM3": ("smollm3", {"tie_word_embeddings": True}),
    "Gemma": ("gemma", {"head_dim": 16, "tie_word_embeddings": True}),
    "Gemma3": ("gemma3_text", {"head_dim": 16, "tie_word_embeddings": True, "sliding_window": 16}),
    "Phi3": ("phi3", {}),
    "Mistral": ("mistral", {"head_dim": 16, "sliding_window": None}),
    "OLMo2": ("olmo2", {}),
    "GPT-NeoX": ("gpt_neox", {}),
}
# Kinds that name their layers differently.
OTHER_TEXT_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2": ("gpt2", {}),
    "BLOOM": ("bloom", {}),
    "OPT": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "Falcon": ("falcon", {}),
    "MPT": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2}),
    "LFM2": ("lfm2", {"full_attn_idxs": [0]}),
    "Qwen3.5": ("qwen3_5_text", {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16}),
}
# Kinds that LLaVA's class cannot run, or of which it would lose a part.
REFUSED_TEXT_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Phi2": ("phi", {}),
    "Gemma2": ("gemma2", {"head_dim": 16}),
    "Cohere": ("cohere", {"logit_scale": 0.0625}),
    "Granite": ("granite", {"logits_scaling": 8.0}),
    "BART": ("bart", {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "d_model": 64}),
    "Mixtral": ("mixtral", {"num_local_experts": 4}),
    "Falcon-H1": ("falcon_h1", {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "lm_head_multiplier": 0.5}),
}
TOWERS = ("CLIP", "SigLIP", "SigLIP2", "DINOv2")


def write_language_model(folder: Path, name: str, *, seed: int = 0) -> Path:
    """Write a random language model of a kind, with the tiny tokenizer without `<image>`."""
    model_type, settings = (TEXT_MODELS | OTHER_TEXT_MODELS | REFUSED_TEXT_MODELS)[name]
    content = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<image>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(common | settings)))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(6.0)  # so that predictions differ visibly between tokens
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_tower(folder: Path, name: str, *, seed: int = 0) -> Path:
    """Write a random vision tower of a kind, for 24×24 pixels, in its published form: SigLIP with its text model."""
    common: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name.startswith("SigLIP"):
            vision = common | {"intermediate_size": 64}
            text = SiglipTextConfig(
                vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
            )
            SiglipModel(SiglipConfig(vision_config=vision, text_config=text.to_dict())).save_pretrained(folder)
        elif name == "CLIP":
            config = AutoConfig.for_model("clip_vision_model", **common, intermediate_size=64, projection_dim=32)
            AutoModel.from_config(config).save_pretrained(folder)
        else:
            AutoModel.from_config(AutoConfig.for_model("dinov2", **common, mlp_ratio=2)).save_pretrained(folder)
    write_image_processor(folder)
    if name.startswith("SigLIP"):
        _edit_processor(folder, "SiglipImageProcessor", size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    elif name == "DINOv2":
        _edit_processor(folder, "BitImageProcessor")
    return folder


def _edit_processor(folder: Path, kind: str, **settings: Any) -> None:
    file = folder / "preprocessor_config.json"
    content = json.loads(file.read_text()) | {"image_processor_type": kind} | settings
    if kind == "SiglipImageProcessor":
        content = {key: value for key, value in content.items() if "crop" not in key}
        content |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    file.write_text(json.dumps(content))
