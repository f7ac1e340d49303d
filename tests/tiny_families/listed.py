"""The families that the README names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tests.tiny_families.form import (
    COHERE,
    GEMMA,
    GRID,
    MISTRAL,
    MROPE,
    PREPARED,
    QWEN,
    ROW_TAGS,
    SMOL,
    VICUNA,
    Settings,
    TinyFamily,
    chatml,
    pixtral_tower,
    siglip,
)


def _qwen_ids(ids: Mapping[str, int]) -> Settings:
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": False,
    }


QWEN3_VISION = {
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
QWEN_IMAGES = {
    **PREPARED,
    "image_processor_type": "Qwen2VLImageProcessor",
    "size": {"shortest_edge": 256, "longest_edge": 2304},
    "patch_size": 4,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "decoder_sparse_step": 1}


def _qwen3_vl(model_type: str, **more: Any) -> Callable[[Settings, Mapping[str, int]], Settings]:
    def config(text: Settings, ids: Mapping[str, int]) -> Settings:
        vision = {**QWEN3_VISION, "deepstack_visual_indexes": [0, 1]}
        return {
            "model_type": model_type,
            "text_config": {**text, "rope_parameters": MROPE, **more},
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
        rope = {**MROPE, "partial_rotary_factor": 1.0}
        return {
            "model_type": model_type,
            "text_config": {**text, "rope_parameters": rope, **linear, **more},
            "vision_config": QWEN3_VISION,
            **_qwen_ids(ids),
        }

    return config


def _qwen(model: str, config: Callable[[Settings, Mapping[str, int]], Settings]) -> TinyFamily:
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    return TinyFamily(model, config, "Qwen3VLProcessor", QWEN_IMAGES, chatml(image), QWEN)


def _gemma3(text: Settings, ids: Mapping[str, int]) -> Settings:
    own = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 48, "query_pre_attn_scalar": 32}
    return {
        "model_type": "gemma3",
        "text_config": {**text, **own, "model_type": "gemma3_text", "tie_word_embeddings": True},
        "vision_config": siglip(32, 4),
        "mm_tokens_per_image": 16,
        "boi_token_index": ids["<start_of_image>"],
        "eoi_token_index": ids["<end_of_image>"],
        "image_token_index": ids["<image_soft_token>"],
    }


def _internvl(text: Settings, ids: Mapping[str, int]) -> Settings:
    vision = {k: v for k, v in siglip(16, 4).items() if k not in ("model_type", "vision_use_head")}
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
        vision = {k: v for k, v in siglip(16, 4).items() if k not in ("model_type", "vision_use_head")}
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
        **PREPARED,
        "image_processor_type": f"{name}ImageProcessor",
        "size": {"longest_edge": 48},
        "max_image_size": {"longest_edge": 16},
        "do_image_splitting": True,
        "do_pad": True,
        "resample": 1,
    }
    tokens = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *ROW_TAGS)
    model = f"{name}ForConditionalGeneration"
    return TinyFamily(model, _idefics3(kind), f"{name}Processor", images, SMOL, tokens, more={"image_seq_len": 4})


def _mistral3(text: Settings, ids: Mapping[str, int]) -> Settings:
    return {
        "model_type": "mistral3",
        "text_config": {**text, "model_type": "mistral"},
        "vision_config": pixtral_tower(),
        "image_token_index": ids["[IMG]"],
        "spatial_merge_size": 2,
        "tie_word_embeddings": False,
    }


def _pixtral(text: Settings, ids: Mapping[str, int]) -> Settings:
    return {
        "model_type": "llava",
        "text_config": {**text, "model_type": "mistral"},
        "vision_config": pixtral_tower(),
        "image_token_index": ids["[IMG]"],
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": False,
    }


def _mistral(model: str, config: Callable[[Settings, Mapping[str, int]], Settings], merge: int) -> TinyFamily:
    images = {
        **PREPARED,
        "image_processor_type": "PixtralImageProcessor",
        "size": {"longest_edge": 48},
        "patch_size": {"height": 4 * merge, "width": 4 * merge},
    }
    tokens = ("[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<s>")
    more = {"patch_size": 4, "spatial_merge_size": merge}
    return TinyFamily(model, config, "PixtralProcessor", images, MISTRAL, tokens, {"bos_token": "<s>"}, more)


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
            "text_config": {**text, "model_type": "glm4v_text", "rope_parameters": MROPE},
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
        **PREPARED,
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
        "vision_config": siglip(16, 4),
        "image_token_index": ids["<|IMG_PATCH|>"],
        "downsample_factor": 2,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "alignment_intermediate_size": 64,
    }


def _llava_next(text: Settings, ids: Mapping[str, int]) -> Settings:
    tower = {k: v for k, v in siglip(16, 4).items() if k != "vision_use_head"}
    return {
        "model_type": "llava_next",
        "text_config": {**text, "model_type": "llama"},
        "vision_config": {**tower, "model_type": "clip_vision_model"},
        "image_token_index": ids["<image>"],
        "image_grid_pinpoints": GRID,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "image_seq_length": 16,
        "tie_word_embeddings": False,
    }


LISTED = {
    "qwen3_vl": _qwen("Qwen3VLForConditionalGeneration", _qwen3_vl("qwen3_vl")),
    "qwen3_vl_moe": _qwen("Qwen3VLMoeForConditionalGeneration", _qwen3_vl("qwen3_vl_moe", **EXPERTS)),
    "qwen3_5": _qwen("Qwen3_5ForConditionalGeneration", _qwen3_5("qwen3_5")),
    "qwen3_5_moe": _qwen(
        "Qwen3_5MoeForConditionalGeneration",
        _qwen3_5("qwen3_5_moe", **EXPERTS, shared_expert_intermediate_size=48),
    ),
    "gemma3": TinyFamily(
        "Gemma3ForConditionalGeneration",
        _gemma3,
        "Gemma3Processor",
        {**PREPARED, "image_processor_type": "Gemma3ImageProcessor", "size": {"height": 32, "width": 32}},
        GEMMA,
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
            **PREPARED,
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
            **PREPARED,
            "image_processor_type": "GotOcr2ImageProcessor",
            "size": {"height": 16, "width": 16},
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": 6,
        },
        COHERE,
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
            **PREPARED,
            "image_processor_type": "LlavaNextImageProcessor",
            "size": {"shortest_edge": 16},
            "crop_size": {"height": 16, "width": 16},
            "do_center_crop": True,
            "image_grid_pinpoints": GRID,
        },
        VICUNA,
        ("<image>",),
        {},
        {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
}
