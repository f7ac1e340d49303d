"""Families beyond those that the README names, to show that what runs them knows no names."""

from __future__ import annotations

from collections.abc import Mapping

from tests.tiny_families.form import (
    COHERE,
    GEMMA,
    MROPE,
    PREPARED,
    VICUNA,
    Settings,
    TinyFamily,
    chatml,
    pixtral_tower,
    siglip,
)


def _tower(size: int, patch: int) -> Settings:
    return {k: v for k, v in siglip(size, patch).items() if k not in ("model_type", "vision_use_head")}


def _gemma4(text: Settings, ids: Mapping[str, int]) -> Settings:
    return {
        "model_type": "gemma4",
        "text_config": {
            **text,
            "model_type": "gemma4_text",
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 48,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": text["vocab_size"],
            "num_kv_shared_layers": 2,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "final_logit_softcapping": 30.0,
            "global_head_dim": 32,
        },
        "vision_config": {
            "model_type": "gemma4_vision",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 128,
        },
        "audio_config": None,
        "boi_token_id": ids["<|image>"],
        "eoi_token_id": ids["<image|>"],
        "image_token_id": ids["<|image|>"],
        "video_token_id": ids["<|video|>"],
        "boa_token_id": ids["<|audio>"],
        "eoa_token_index": ids["<audio|>"],
        "audio_token_id": ids["<|audio|>"],
    }


def _lfm2(text: Settings, ids: Mapping[str, int]) -> Settings:
    return {
        "model_type": "lfm2_vl",
        "text_config": {**text, "model_type": "lfm2", "layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
        "vision_config": {**siglip(32, 4), "model_type": "siglip2_vision_model", "num_patches": 64},
        "image_token_id": ids["<image>"],
        "projector_hidden_size": 48,
        "downsample_factor": 2,
        "tie_word_embeddings": False,
    }


def _cohere2(text: Settings, ids: Mapping[str, int]) -> Settings:
    return {
        "model_type": "cohere2_vision",
        "text_config": {**text, "model_type": "cohere2", "logit_scale": 0.25, "tie_word_embeddings": True},
        "vision_config": siglip(16, 4),
        "image_token_id": ids["<|IMG_PATCH|>"],
        "downsample_factor": 2,
        "alignment_intermediate_size": 64,
    }


def _ovis(text: Settings, ids: Mapping[str, int]) -> Settings:
    return {
        "model_type": "ovis2",
        "text_config": {**text, "model_type": "qwen2"},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
            "vocab_size": 64,
            "hidden_stride": 2,
            "num_visual_indicator_tokens": 5,
        },
        "image_token_id": ids["<IMG_ATOM>"],
        "visual_indicator_token_ids": [
            ids[t] for t in ("<img_start>", "<img_grid>", "<img_col>", "<img_row>", "<img_end>")
        ],
        "vocab_size": text["vocab_size"],
        "hidden_size": 64,
        "tie_word_embeddings": False,
    }


def _llama4(text: Settings, ids: Mapping[str, int]) -> Settings:
    return {
        "model_type": "llama4",
        "text_config": {
            **text,
            "intermediate_size_mlp": 96,
            "num_local_experts": 2,
            "moe_layers": [1],
            "attention_chunk_size": 64,
            "no_rope_layers": [1, 0],
            "layer_types": ["chunked_attention", "full_attention"],
        },
        "vision_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "vision_output_dim": 64,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "image_size": 16,
            "patch_size": 4,
            "pixel_shuffle_ratio": 0.5,
        },
        "boi_token_index": ids["<|image_start|>"],
        "eoi_token_index": ids["<|image_end|>"],
        "image_token_index": ids["<|patch|>"],
    }


def _janus(text: Settings, ids: Mapping[str, int]) -> Settings:
    return {
        "model_type": "janus",
        "text_config": {**text, "model_type": "llama"},
        "vision_config": {
            **_tower(16, 4),
            "model_type": "janus_vision_model",
            "mlp_ratio": 1.5,
            "projection_dim": 64,
            "num_image_tokens": 16,
            "depth": 2,
        },
        "vq_config": {
            "embed_dim": 8,
            "num_embeddings": 16,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "projection_dim": 64,
            "image_token_embed_dim": 64,
            "num_patches": 4,
        },
        "image_token_id": ids["<image_placeholder>"],
        "tie_word_embeddings": False,
    }


def _dsvl(text: Settings, ids: Mapping[str, int]) -> Settings:
    return {
        "model_type": "deepseek_vl",
        "text_config": {**text, "model_type": "llama"},
        "vision_config": siglip(16, 4),
        "image_token_id": ids["<image_placeholder>"],
        "tie_word_embeddings": False,
    }


def _vl3(text: Settings, ids: Mapping[str, int]) -> Settings:
    return {
        "model_type": "video_llama_3",
        "text_config": {**text, "model_type": "qwen2"},
        "vision_config": {**{k: v for k, v in _tower(16, 4).items() if k != "image_size"}},
        "image_token_id": ids["<image>"],
        "video_token_id": ids["<video>"],
        "tie_word_embeddings": False,
    }


def _vip(text: Settings, ids: Mapping[str, int]) -> Settings:
    return {
        "model_type": "vipllava",
        "text_config": {**text, "model_type": "llama"},
        "vision_config": {
            k: v
            for k, v in {**siglip(16, 4), "model_type": "clip_vision_model", "num_hidden_layers": 4}.items()
            if k != "vision_use_head"
        },
        "image_token_index": ids["<image>"],
        "vision_feature_layers": [-2, -1],
        "image_seq_length": 16,
        "tie_word_embeddings": False,
    }


def _paddle(text: Settings, ids: Mapping[str, int]) -> Settings:
    return {
        "model_type": "paddleocr_vl",
        "text_config": {**text, "rope_parameters": MROPE},
        "vision_config": {**_tower(32, 4), "spatial_merge_size": 2},
        "image_token_id": ids["<|IMAGE_PLACEHOLDER|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|IMAGE_START|>"],
        "vision_end_token_id": ids["<|IMAGE_END|>"],
        "tie_word_embeddings": False,
    }


def _lighton(text: Settings, ids: Mapping[str, int]) -> Settings:
    return {
        "model_type": "lighton_ocr",
        "text_config": {**text, "model_type": "qwen3"},
        "vision_config": pixtral_tower(),
        "image_token_id": ids["<|image_pad|>"],
        "spatial_merge_size": 2,
        "tie_word_embeddings": False,
    }


def _pali(text: Settings, ids: Mapping[str, int]) -> Settings:
    return {
        "model_type": "paligemma",
        "text_config": {
            **text,
            "model_type": "gemma2",
            "query_pre_attn_scalar": 32,
            "sliding_window": 4096,
            "layer_types": ["full_attention"] * 2,
            "final_logit_softcapping": 30.0,
            "tie_word_embeddings": True,
            "vocab_size": text["vocab_size"] + 1200,
        },
        "vision_config": {**siglip(16, 4), "num_image_tokens": 16, "projection_dim": 64},
        "image_token_index": ids["<image>"],
        "projection_dim": 64,
        "hidden_size": 64,
    }


OTHERS = {
    "gemma4": TinyFamily(
        "Gemma4ForConditionalGeneration",
        _gemma4,
        "Gemma4Processor",
        {
            **PREPARED,
            "do_normalize": False,
            "image_processor_type": "Gemma4ImageProcessor",
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "max_soft_tokens": 70,
        },
        GEMMA.replace("<start_of_image>", "<|image|>"),
        ("<bos>", "<start_of_turn>", "<end_of_turn>", "<|audio>", "<audio|>", "<|video|>", "<|image|>"),
        {
            "bos_token": "<bos>",
            "boi_token": "<|image>",
            "eoi_token": "<image|>",
            "image_token": "<|image|>",
            "audio_token": "<|audio|>",
            "boa_token": "<|audio>",
            "eoa_token": "<audio|>",
        },
        {"image_seq_length": 70},
    ),
    "lfm2_vl": TinyFamily(
        "Lfm2VlForConditionalGeneration",
        _lfm2,
        "Lfm2VlProcessor",
        {
            **PREPARED,
            "image_processor_type": "Lfm2VlImageProcessor",
            "downsample_factor": 2,
            "do_image_splitting": True,
            "min_tiles": 2,
            "max_tiles": 4,
            "use_thumbnail": True,
            "min_image_tokens": 4,
            "max_image_tokens": 16,
            "encoder_patch_size": 4,
            "tile_size": 32,
            "max_pixels_tolerance": 2.0,
            "max_num_patches": 64,
        },
        "{{ bos_token }}" + chatml("<image>"),
        (
            "<s>",
            "<image>",
            "<|image_start|>",
            "<|image_end|>",
            "<|img_thumbnail|>",
            *[f"<|img_row_{r}_col_{c}|>" for r in range(1, 5) for c in range(1, 5)],
        ),
        {
            "bos_token": "<s>",
            "image_token": "<image>",
            "image_start_token": "<|image_start|>",
            "image_end_token": "<|image_end|>",
            "image_thumbnail": "<|img_thumbnail|>",
        },
    ),
    "cohere2_vision": TinyFamily(
        "Cohere2VisionForConditionalGeneration",
        _cohere2,
        "Cohere2VisionProcessor",
        {
            **PREPARED,
            "image_processor_type": "Cohere2VisionImageProcessor",
            "size": {"height": 16, "width": 16},
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": 6,
            "patch_size": 2,
        },
        COHERE.replace("<image>", "<|IMG_PATCH|>"),
        ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|USER_TOKEN|>"),
        {
            "bos_token": "<BOS_TOKEN>",
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "image_token": "<|IMG_PATCH|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
    ),
    "ovis2": TinyFamily(
        "Ovis2ForConditionalGeneration",
        _ovis,
        "Ovis2Processor",
        {
            **PREPARED,
            "image_processor_type": "Ovis2ImageProcessor",
            "size": {"height": 16, "width": 16},
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": 4,
            "use_covering_area_grid": True,
        },
        chatml("<image>\n"),
        ("<image>", "<IMG_ATOM>", "<img_start>", "<img_grid>", "<img_col>", "<img_row>", "<img_end>"),
        {"image_token": "<image>"},
        {"image_seq_length": 4},
    ),
    "llama4": TinyFamily(
        "Llama4ForConditionalGeneration",
        _llama4,
        "Llama4Processor",
        {
            **PREPARED,
            "image_processor_type": "Llama4ImageProcessor",
            "size": {"height": 16, "width": 16},
            "max_patches": 4,
            "resize_to_max_canvas": False,
        },
        chatml("<|image|>"),
        ("<|image_start|>", "<|image_end|>", "<|patch|>", "<|image|>", "<|tile_x_separator|>", "<|tile_y_separator|>"),
        {"image_token": "<|image|>"},
        {"patch_size": 4, "pixel_shuffle_ratio": 0.5},
    ),
    "janus": TinyFamily(
        "JanusForConditionalGeneration",
        _janus,
        "JanusProcessor",
        {**PREPARED, "image_processor_type": "JanusImageProcessor", "size": {"height": 16, "width": 16}, "min_size": 2},
        chatml("<image_placeholder>"),
        (),
        {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"},
        {"num_image_tokens": 16},
    ),
    "deepseek_vl": TinyFamily(
        "DeepseekVLForConditionalGeneration",
        _dsvl,
        "DeepseekVLProcessor",
        {
            **PREPARED,
            "image_processor_type": "DeepseekVLImageProcessor",
            "size": {"height": 16, "width": 16},
            "min_size": 2,
        },
        chatml("<image_placeholder>"),
        (),
        {"image_token": "<image_placeholder>"},
        {"num_image_tokens": 16},
    ),
    "video_llama_3": TinyFamily(
        "VideoLlama3ForConditionalGeneration",
        _vl3,
        "VideoLlama3Processor",
        {
            **PREPARED,
            "image_processor_type": "VideoLlama3ImageProcessor",
            "patch_size": 4,
            "merge_size": 1,
            "min_tokens": 4,
            "max_tokens": 64,
            "size": {"shortest_edge": 256, "longest_edge": 2304},
        },
        chatml("<image>"),
        ("<image>", "<video>"),
        {"image_token": "<image>", "video_token": "<video>"},
    ),
    "vipllava": TinyFamily(
        "VipLlavaForConditionalGeneration",
        _vip,
        "LlavaProcessor",
        {
            **PREPARED,
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 16},
            "crop_size": {"height": 16, "width": 16},
            "do_center_crop": True,
        },
        VICUNA,
        ("<image>",),
        {},
        {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "paddleocr_vl": TinyFamily(
        "PaddleOCRVLForConditionalGeneration",
        _paddle,
        "PaddleOCRVLProcessor",
        {
            **PREPARED,
            "image_processor_type": "PaddleOCRVLImageProcessor",
            "patch_size": 4,
            "temporal_patch_size": 1,
            "merge_size": 2,
            "size": {"shortest_edge": 256, "longest_edge": 2304},
        },
        chatml("<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"),
        ("<|IMAGE_START|>", "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_END|>", "<|video_pad|>"),
        {"image_token": "<|IMAGE_PLACEHOLDER|>"},
    ),
    "lighton_ocr": TinyFamily(
        "LightOnOcrForConditionalGeneration",
        _lighton,
        "LightOnOcrProcessor",
        {
            **PREPARED,
            "image_processor_type": "PixtralImageProcessor",
            "size": {"longest_edge": 48},
            "patch_size": {"height": 4, "width": 4},
        },
        chatml("<|image_pad|>"),
        ("<|image_pad|>", "<|vision_pad|>", "<|vision_end|>"),
        {"image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>", "image_end_token": "<|vision_end|>"},
        {"patch_size": 4, "spatial_merge_size": 2},
    ),
    "paligemma": TinyFamily(
        "PaliGemmaForConditionalGeneration",
        _pali,
        "PaliGemmaProcessor",
        {
            **PREPARED,
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": 16, "width": 16},
            "image_seq_length": 16,
        },
        "",
        ("<image>", "<bos>"),
        {"bos_token": "<bos>"},
    ),
}
