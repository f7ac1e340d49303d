"""Tiny teachers of families other than LLaVA, made on the spot: random weights in real checkpoint folders.

Every text model has attention heads of dimension 32, so that vLLM runs it on a CPU too. The tokenizers share
`tiny_tokenizer`'s vocabulary and merges; only the special tokens at the end differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
)

from llavamod_offline.families.llava.export import save_llava
from tests.tiny import IMAGE_SIZE, IMAGE_TOKENS, tiny_tokenizer, tiny_vision_config, write_image_processor

QWEN_VL_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
_MEAN, _STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_QWEN_PATCH = 4
_TILE = 16


def tokenizer_with(*special: str) -> PreTrainedTokenizerFast:
    """`tiny_tokenizer` without `<image>`, and with more special tokens at the end."""
    content = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<image>"]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def write_tiny_qwen_vl(folder: Path, version: str = "2.5", *, seed: int = 0, spare_rows: int = 12) -> Path:
    """Write a random Qwen2-VL (`version` 2) or Qwen2.5-VL (2.5): patches of 4 pixels merged by 2, 4 to 36 tokens."""
    tokenizer = tokenizer_with(*QWEN_VL_TOKENS)
    ids = tokenizer.get_vocab()
    config_class, model_class = {
        "2": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
        "2.5": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    }[version]
    text = {
        **_text_settings(len(tokenizer) + spare_rows),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
    }
    vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": _QWEN_PATCH, "spatial_merge_size": 2}
    if version == "2":
        vision |= {"embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 64}
        vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    config = config_class(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    processor = {
        "processor_class": "Qwen2_5_VLProcessor" if version == "2.5" else "Qwen2VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _MEAN,
        "image_std": _STD,
        "min_pixels": 4 * (2 * _QWEN_PATCH) ** 2,
        "max_pixels": 36 * (2 * _QWEN_PATCH) ** 2,
        "patch_size": _QWEN_PATCH,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    return _write(folder, model_class, config, tokenizer, seed, processor)


def write_tiny_onevision(folder: Path, *, seed: int = 0, spare_rows: int = 12) -> Path:
    """Write a random LLaVA-OneVision: tiles of 16 pixels with 16 features each, on grids of up to 48 by 48."""
    tokenizer = tokenizer_with("<image>", "<video>")
    ids = tokenizer.get_vocab()
    grid = [[_TILE * rows, _TILE * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=_TILE,
            patch_size=_TILE // 4,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(**_text_settings(len(tokenizer) + spare_rows)),
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=grid,
        vision_aspect_ratio="anyres_max_4",
        tie_word_embeddings=False,
    )
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": _TILE, "width": _TILE},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_pad": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_grid_pinpoints": grid,
    }
    _write(folder, LlavaOnevisionForConditionalGeneration, config, tokenizer, seed, processor)
    content = {
        "processor_class": "LlavaOnevisionProcessor",
        "image_token": "<image>",
        "video_token": "<video>",
        "num_image_tokens": 16,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_4",
    }
    (folder / "processor_config.json").write_text(json.dumps(content, indent=2) + "\n")
    return folder


def write_tiny_causal_lm(
    folder: Path,
    kind: str = "qwen2",
    *,
    special: tuple[str, ...] = (),
    seed: int = 0,
    spare_rows: int = 12,
    tokenizer: Any = None,
    **settings: Any,
) -> Path:
    """Write a random text-only language model; `kind` is a transformers model type.

    `special`: additional special tokens; `settings`: settings of its configuration.
    """
    tokenizer = tokenizer or tokenizer_with(*special)
    config = AutoConfig.for_model(kind, **{**_text_settings(len(tokenizer) + spare_rows), **settings})
    return _write(folder, AutoModelForCausalLM.from_config, config, tokenizer, seed, None)


def write_tiny_llava_llama(
    folder: Path, *, seed: int = 0, tower: str = "clip", strategy: str = "default", tokenizer: Any = None
) -> Path:
    """Write a random LLaVA whose text model is a Llama, with a CLIP, SigLIP or DINOv2 tower.

    Patches have 8 pixels, except SigLIP's with 7, which leave 3 pixels over, as in its released 384-pixel model.
    """
    tokenizer = tokenizer or tiny_tokenizer()
    vision, processor = _TOWERS[tower]()
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**_text_settings(len(tokenizer))),
        image_token_index=tokenizer.get_vocab()["<image>"],
        vision_feature_layer=-2,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=False,
        **({"image_seq_length": IMAGE_TOKENS} if tower == "clip" else {}),
    )
    source = folder.parent / f".{folder.name}.processor"
    source.mkdir(parents=True)
    write_image_processor(source)
    if processor is not None:
        (source / "preprocessor_config.json").write_text(json.dumps(processor))
    model = random_model(LlavaForConditionalGeneration, config, seed)
    save_llava(model, folder, tokenizer=tokenizer, processor_source=source)
    return folder


def _siglip() -> tuple[Any, dict[str, Any]]:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    halves = [0.5, 0.5, 0.5]
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "size": size,
        "image_mean": halves,
        "image_std": halves,
    }
    return SiglipVisionConfig(**_tower(7)), processor


def _dinov2(kind: Any = Dinov2Config) -> tuple[Any, dict[str, Any]]:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    shape = _tower(8)
    del shape["intermediate_size"]
    processor = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 27}, "crop_size": size}
    return kind(**shape), processor


def _tower(patch: int) -> dict[str, Any]:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    return shape | {"image_size": IMAGE_SIZE, "patch_size": patch}


_TOWERS: dict[str, Callable[[], tuple[Any, dict[str, Any] | None]]] = {
    "clip": lambda: (tiny_vision_config(), None),
    "siglip": _siglip,
    "dinov2": _dinov2,
    "dinov2_with_registers": lambda: _dinov2(Dinov2WithRegistersConfig),
}


def _text_settings(rows: int) -> dict[str, Any]:
    return {
        "vocab_size": rows,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }


def _write(
    folder: Path,
    model_class: Any,
    config: Any,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    processor: dict[str, Any] | None,
) -> Path:
    random_model(model_class, config, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    return folder


def random_model(model_class: Any, config: Any, seed: int) -> Any:
    """Random weights, scaled up so that predictions differ visibly between tokens and images."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = model_class(config).eval()
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(std=0.1)
            elif parameter.ndim >= 2:
                table = "embed_tokens" in name or "lm_head" in name
                parameter.normal_(std=0.4 if table else 1.2 / parameter[0].numel() ** 0.5)
    return model
