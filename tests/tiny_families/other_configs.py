"""Configurations of families that the README does not name, from the text model's settings and the tokens' ids."""

from __future__ import annotations

from collections.abc import Mapping

from tests.tiny_families.form import (
    MROPE,
    Settings,
    pixtral_tower,
    siglip,
)


def _tower(size: int, patch: int) -> Settings:
    return {k: v for k, v in siglip(size, patch).items() if k not in ("model_type", "vision_use_head")}


def gemma4(text: Settings, ids: Mapping[str, int]) -> Settings:
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


def lfm2(text: Settings, ids: Mapping[str, int]) -> Settings:
    return {
        "model_type": "lfm2_vl",
        "text_config": {**text, "model_type": "lfm2", "layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
        "vision_config": {**siglip(32, 4), "model_type": "siglip2_vision_model", "num_patches": 64},
        "image_token_id": ids["<image>"],
        "projector_hidden_size": 48,
        "downsample_factor": 2,
        "tie_word_embeddings": False,
    }


def cohere2(text: Settings, ids: Mapping[str, int]) -> Settings:
    return {
        "model_type": "cohere2_vision",
        "text_config": {**text, "model_type": "cohere2", "logit_scale": 0.25, "tie_word_embeddings": True},
        "vision_config": siglip(16, 4),
        "image_token_id": ids["<|IMG_PATCH|>"],
        "downsample_factor": 2,
        "alignment_intermediate_size": 64,
    }


def ovis(text: Settings, ids: Mapping[str, int]) -> Settings:
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


def llama4(text: Settings, ids: Mapping[str, int]) -> Settings:
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


def janus(text: Settings, ids: Mapping[str, int]) -> Settings:
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


def dsvl(text: Settings, ids: Mapping[str, int]) -> Settings:
    return {
        "model_type": "deepseek_vl",
        "text_config": {**text, "model_type": "llama"},
        "vision_config": siglip(16, 4),
        "image_token_id": ids["<image_placeholder>"],
        "tie_word_embeddings": False,
    }


def vl3(text: Settings, ids: Mapping[str, int]) -> Settings:
    return {
        "model_type": "video_llama_3",
        "text_config": {**text, "model_type": "qwen2"},
        "vision_config": {**{k: v for k, v in _tower(16, 4).items() if k != "image_size"}},
        "image_token_id": ids["<image>"],
        "video_token_id": ids["<video>"],
        "tie_word_embeddings": False,
    }


def vip(text: Settings, ids: Mapping[str, int]) -> Settings:
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


def paddle(text: Settings, ids: Mapping[str, int]) -> Settings:
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


def lighton(text: Settings, ids: Mapping[str, int]) -> Settings:
    return {
        "model_type": "lighton_ocr",
        "text_config": {**text, "model_type": "qwen3"},
        "vision_config": pixtral_tower(),
        "image_token_id": ids["<|image_pad|>"],
        "spatial_merge_size": 2,
        "tie_word_embeddings": False,
    }


def pali(text: Settings, ids: Mapping[str, int]) -> Settings:
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
