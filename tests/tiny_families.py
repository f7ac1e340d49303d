"""Tiny checkpoints of the image-text families that run by their own processors: random weights in real folders.

Each family has its processor's settings, the special tokens that it needs, and a chat template worded as the released
one. Text models have two layers; images are cut into patches of a few pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedTokenizerFast

from tests.tiny_teachers import random_model, tokenizer_with

Settings = dict[str, Any]

_HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_PIXELS = {"do_convert_rgb": True, "do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255}
_PREPARED = {**_PIXELS, "do_normalize": True, **_HALVES}
_QWEN = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
_ROW_TAGS = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))


def _parts(image: str, trim: str = "") -> str:
    """A message's content, given as text or as parts."""
    return (
        f"{{%- if message.content is string -%}}{{{{ message.content{trim} }}}}{{%- else -%}}"
        "{%- for part in message.content -%}{%- if part.type == 'image' -%}"
        f"{{{{ '{image}' }}}}{{%- else -%}}{{{{ part.text{trim} }}}}{{%- endif -%}}{{%- endfor -%}}{{%- endif -%}}"
    )


def chatml(image: str) -> str:
    """Turns as Qwen's models word them, without a system turn of their own."""
    return (
        "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\n' }}"
        + _parts(image)
        + "{{ '<|im_end|>\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    )


_GEMMA = (
    "{{ bos_token }}{%- for message in messages -%}"
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}"
    + _parts("<start_of_image>", " | trim")
    + "{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
_SMOL = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{%- for message in messages -%}{%- if message.role == 'user' -%}{{ '[INST]' }}"
    + _parts("[IMG]")
    + "{{ '[/INST]' }}{%- else -%}"
    + _parts("[IMG]")
    + "{{ eos_token }}{%- endif -%}{%- endfor -%}"
)
_COHERE = (
    "{{ bos_token }}{%- for message in messages -%}{{ '<|START_OF_TURN_TOKEN|>' + ("
    "'<|CHATBOT_TOKEN|>' if message.role == 'assistant' else '<|USER_TOKEN|>') }}"
    + _parts("<image>")
    + "{{ '<|END_OF_TURN_TOKEN|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{%- endif -%}"
)
_VICUNA = (
    "{%- for message in messages -%}{%- if message.role == 'user' -%}{{ 'USER: ' }}"
    + _parts("<image>\n")
    + "{{ ' ASSISTANT:' }}{%- else -%}{{ ' ' }}"
    + _parts("<image>\n")
    + "{{ eos_token }}{%- endif -%}{%- endfor -%}"
)


@dataclass(frozen=True)
class TinyFamily:
    """How a family's folder is made. `config` gets the text model's settings and the tokens' ids.

    `named`: tokens that the tokenizer knows by a name, such as `boi_token`. `images`: the image processor's settings.
    """

    model: str
    config: Callable[[Settings, Mapping[str, int]], Settings]
    processor: str
    images: Settings
    chat_template: str
    tokens: tuple[str, ...]
    named: Mapping[str, str] = field(default_factory=dict)
    more: Settings = field(default_factory=dict)

    def write(self, folder: Path, *, seed: int = 0, spare_rows: int = 12) -> Path:
        """Write a checkpoint with random weights."""
        special = tuple(dict.fromkeys((*self.tokens, *self.named.values())))
        plain = tokenizer_with(*(token for token in special if token not in ("<|endoftext|>", "<|im_end|>")))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=plain.backend_tokenizer,
            **{"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", **self.named},
            clean_up_tokenization_spaces=False,
        )
        ids = tokenizer.get_vocab()
        settings = self.config(_text(len(tokenizer) + spare_rows), ids)
        config = AutoConfig.for_model(**settings)
        random_model(getattr(transformers, self.model), config, seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _write(folder / "preprocessor_config.json", {"processor_class": self.processor, **self.images})
        _write(folder / "processor_config.json", {"processor_class": self.processor, **self.more})
        (folder / "chat_template.jinja").write_text(self.chat_template)
        return folder


def _text(rows: int) -> Settings:
    return {
        "vocab_size": rows,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }


def _qwen_ids(ids: Mapping[str, int]) -> Settings:
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": False,
    }


_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
_QWEN3_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
}
_QWEN_IMAGES = {
    **_PREPARED,
    "image_processor_type": "Qwen2VLImageProcessor",
    "size": {"shortest_edge": 256, "longest_edge": 2304},
    "patch_size": 4,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "decoder_sparse_step": 1}


def _qwen3_vl(model_type: str, **more: Any) -> Callable[[Settings, Mapping[str, int]], Settings]:
    def config(text: Settings, ids: Mapping[str, int]) -> Settings:
        vision = {**_QWEN3_VISION, "deepstack_visual_indexes": [0, 1]}
        return {
            "model_type": model_type,
            "text_config": {**text, "rope_parameters": _MROPE, **more},
            "vision_config": vision,
            **_qwen_ids(ids),
        }

    return config


def _qwen3_5(model_type: str, **more: Any) -> Callable[[Settings, Mapping[str, int]], Settings]:
    def config(text: Settings, ids: Mapping[str, int]) -> Settings:
        linear = {
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
        }
        rope = {**_MROPE, "partial_rotary_factor": 1.0}
        return {
            "model_type": model_type,
            "text_config": {**text, "rope_parameters": rope, **linear, **more},
            "vision_config": _QWEN3_VISION,
            **_qwen_ids(ids),
        }

    return config


def _qwen(model: str, config: Callable[[Settings, Mapping[str, int]], Settings]) -> TinyFamily:
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    return TinyFamily(model, config, "Qwen3VLProcessor", _QWEN_IMAGES, chatml(image), _QWEN)


def _siglip(size: int, patch: int, **more: Any) -> Settings:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": size,
        "patch_size": patch,
        "vision_use_head": False,
        **more,
    }


def _gemma3(text: Settings, ids: Mapping[str, int]) -> Settings:
    own = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 48, "query_pre_attn_scalar": 32}
    return {
        "model_type": "gemma3",
        "text_config": {**text, **own, "model_type": "gemma3_text", "tie_word_embeddings": True},
        "vision_config": _siglip(32, 4),
        "mm_tokens_per_image": 16,
        "boi_token_index": ids["<start_of_image>"],
        "eoi_token_index": ids["<end_of_image>"],
        "image_token_index": ids["<image_soft_token>"],
    }


def _internvl(text: Settings, ids: Mapping[str, int]) -> Settings:
    vision = {k: v for k, v in _siglip(16, 4).items() if k not in ("model_type", "vision_use_head")}
    return {
        "model_type": "internvl",
        "text_config": {**text, "model_type": "qwen2"},
        "vision_config": {**vision, "image_size": [16, 16], "patch_size": [4, 4]},
        "image_token_id": ids["<IMG_CONTEXT>"],
        "image_seq_length": 4,
        "downsample_ratio": 0.5,
        "tie_word_embeddings": False,
    }


def _idefics3(model_type: str) -> Callable[[Settings, Mapping[str, int]], Settings]:
    def config(text: Settings, ids: Mapping[str, int]) -> Settings:
        vision = {k: v for k, v in _siglip(16, 4).items() if k not in ("model_type", "vision_use_head")}
        return {
            "model_type": model_type,
            "text_config": {**text, "model_type": "llama"},
            "vision_config": vision,
            "image_token_id": ids["<image>"],
            "scale_factor": 2,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
        }

    return config


def _smol(name: str, kind: str) -> TinyFamily:
    images = {
        **_PREPARED,
        "image_processor_type": f"{name}ImageProcessor",
        "size": {"longest_edge": 48},
        "max_image_size": {"longest_edge": 16},
        "do_image_splitting": True,
        "do_pad": True,
        "resample": 1,
    }
    tokens = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *_ROW_TAGS)
    model = f"{name}ForConditionalGeneration"
    return TinyFamily(model, _idefics3(kind), f"{name}Processor", images, _SMOL, tokens, more={"image_seq_len": 4})


def _mistral3(text: Settings, ids: Mapping[str, int]) -> Settings:
    return {
        "model_type": "mistral3",
        "text_config": {**text, "model_type": "mistral"},
        "vision_config": _pixtral_tower(),
        "image_token_index": ids["[IMG]"],
        "spatial_merge_size": 2,
        "tie_word_embeddings": False,
    }


def _pixtral(text: Settings, ids: Mapping[str, int]) -> Settings:
    return {
        "model_type": "llava",
        "text_config": {**text, "model_type": "mistral"},
        "vision_config": _pixtral_tower(),
        "image_token_index": ids["[IMG]"],
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": False,
    }


def _pixtral_tower() -> Settings:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {"model_type": "pixtral", **shape, "image_size": 48, "patch_size": 4}


def _mistral(model: str, config: Callable[[Settings, Mapping[str, int]], Settings], merge: int) -> TinyFamily:
    images = {
        **_PREPARED,
        "image_processor_type": "PixtralImageProcessor",
        "size": {"longest_edge": 48},
        "patch_size": {"height": 4 * merge, "width": 4 * merge},
    }
    tokens = ("[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<s>")
    more = {"patch_size": 4, "spatial_merge_size": merge}
    return TinyFamily(model, config, "PixtralProcessor", images, _MISTRAL, tokens, {"bos_token": "<s>"}, more)


def _glm4v(model_type: str) -> Callable[[Settings, Mapping[str, int]], Settings]:
    def config(text: Settings, ids: Mapping[str, int]) -> Settings:
        vision = {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 64,
            "image_size": 32,
        }
        return {
            "model_type": model_type,
            "text_config": {**text, "model_type": "glm4v_text", "rope_parameters": _MROPE},
            "vision_config": {**vision, "model_type": "glm4v_vision"},
            "image_token_id": ids["<|image|>"],
            "video_token_id": ids["<|video|>"],
            "image_start_token_id": ids["<|begin_of_image|>"],
            "image_end_token_id": ids["<|end_of_image|>"],
            "video_start_token_id": ids["<|begin_of_video|>"],
            "video_end_token_id": ids["<|end_of_video|>"],
            "tie_word_embeddings": False,
        }

    return config


def _glm(name: str, kind: str) -> TinyFamily:
    images = {
        **_PREPARED,
        "image_processor_type": f"{name}ImageProcessor",
        "size": {"shortest_edge": 256, "longest_edge": 4608},
        "patch_size": 4,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    images_tokens = ("<|begin_of_image|>", "<|end_of_image|>", "<|image|>")
    tokens = (*images_tokens, "<|begin_of_video|>", "<|end_of_video|>", "<|video|>")
    image = "<|begin_of_image|><|image|><|end_of_image|>"
    model = f"{name}ForConditionalGeneration"
    return TinyFamily(model, _glm4v(kind), f"{name}Processor", images, chatml(image), tokens)


def _aya(text: Settings, ids: Mapping[str, int]) -> Settings:
    return {
        "model_type": "aya_vision",
        "text_config": {**text, "model_type": "cohere2", "logit_scale": 1.0, "tie_word_embeddings": True},
        "vision_config": _siglip(16, 4),
        "image_token_index": ids["<|IMG_PATCH|>"],
        "downsample_factor": 2,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "alignment_intermediate_size": 64,
    }


def _llava_next(text: Settings, ids: Mapping[str, int]) -> Settings:
    tower = {k: v for k, v in _siglip(16, 4).items() if k != "vision_use_head"}
    return {
        "model_type": "llava_next",
        "text_config": {**text, "model_type": "llama"},
        "vision_config": {**tower, "model_type": "clip_vision_model"},
        "image_token_index": ids["<image>"],
        "image_grid_pinpoints": _GRID,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "image_seq_length": 16,
        "tie_word_embeddings": False,
    }


_GRID = [[16 * rows, 16 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]

TINY_FAMILIES = {
    "qwen3_vl": _qwen("Qwen3VLForConditionalGeneration", _qwen3_vl("qwen3_vl")),
    "qwen3_vl_moe": _qwen("Qwen3VLMoeForConditionalGeneration", _qwen3_vl("qwen3_vl_moe", **_EXPERTS)),
    "qwen3_5": _qwen("Qwen3_5ForConditionalGeneration", _qwen3_5("qwen3_5")),
    "qwen3_5_moe": _qwen(
        "Qwen3_5MoeForConditionalGeneration",
        _qwen3_5("qwen3_5_moe", **_EXPERTS, shared_expert_intermediate_size=48),
    ),
    "gemma3": TinyFamily(
        "Gemma3ForConditionalGeneration",
        _gemma3,
        "Gemma3Processor",
        {**_PREPARED, "image_processor_type": "Gemma3ImageProcessor", "size": {"height": 32, "width": 32}},
        _GEMMA,
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
        {
            "bos_token": "<bos>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        {"image_seq_length": 16},
    ),
    "internvl": TinyFamily(
        "InternVLForConditionalGeneration",
        _internvl,
        "InternVLProcessor",
        {
            **_PREPARED,
            "image_processor_type": "GotOcr2ImageProcessor",
            "size": {"height": 16, "width": 16},
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": 6,
        },
        chatml("<IMG_CONTEXT>"),
        ("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        {"image_seq_length": 4},
    ),
    "idefics3": _smol("Idefics3", "idefics3"),
    "smolvlm": _smol("SmolVLM", "smolvlm"),
    "mistral3": _mistral("Mistral3ForConditionalGeneration", _mistral3, 2),
    "pixtral": _mistral("LlavaForConditionalGeneration", _pixtral, 1),
    "glm4v": _glm("Glm4v", "glm4v"),
    "glm46v": _glm("Glm46V", "glm46v"),
    "aya_vision": TinyFamily(
        "AyaVisionForConditionalGeneration",
        _aya,
        "AyaVisionProcessor",
        {
            **_PREPARED,
            "image_processor_type": "GotOcr2ImageProcessor",
            "size": {"height": 16, "width": 16},
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": 6,
        },
        _COHERE,
        (
            *("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>"),
            *("<|USER_TOKEN|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "<image>"),
            *("TILE_GLOBAL", *(f"TILE_{number}" for number in range(1, 10))),
        ),
        {"bos_token": "<BOS_TOKEN>"},
        {"patch_size": 4, "img_size": 16, "downsample_factor": 2},
    ),
    "llava_next": TinyFamily(
        "LlavaNextForConditionalGeneration",
        _llava_next,
        "LlavaNextProcessor",
        {
            **_PREPARED,
            "image_processor_type": "LlavaNextImageProcessor",
            "size": {"shortest_edge": 16},
            "crop_size": {"height": 16, "width": 16},
            "do_center_crop": True,
            "image_grid_pinpoints": _GRID,
        },
        _VICUNA,
        ("<image>",),
        {},
        {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
}

NEED_TORCHVISION = ("mistral3", "pixtral")


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
