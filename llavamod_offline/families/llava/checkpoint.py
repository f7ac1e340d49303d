"""Load LLaVA checkpoints, and what their configuration says about image tokens and sequences."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llavamod_offline.data.encode.template import Template
from llavamod_offline.data.encode.tokenize import SequenceEncoder
from llavamod_offline.data.sample import IMAGE_PLACEHOLDER
from llavamod_offline.errors import ModelError, first_line
from llavamod_offline.families.llava.towers import extra_tokens
from llavamod_offline.models.checkpoint import load_weights, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IMAGE_PROCESSOR_FILE = "preprocessor_config.json"
_DEFAULT_SEQ_LENGTH = 576


def load_llava(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> LlavaForConditionalGeneration:
    """Load a LLaVA model with a dense or sparse text model, in evaluation mode, on the CPU, in `dtype`.

    `settings` are passed to `from_pretrained`.
    Errors: `ModelError` if `folder` is not a LLaVA checkpoint, a tensor is missing, unexpected, mis-shaped or
    unreadable, or the image processor does not fit the vision tower.
    """
    config = load_config(folder)
    image_tokens(config)
    check_image_size(folder, read_image_processor(folder), config)
    return cast(
        "LlavaForConditionalGeneration",
        load_weights(LlavaForConditionalGeneration, folder, dtype=dtype, config=config, **settings),
    )


def load_config(folder: Path) -> LlavaConfig:
    """Read a LLaVA folder's configuration. Errors: `ModelError` if it is missing or of another model type."""
    model_type = read_json(folder, "config.json").get("model_type")
    if model_type != "llava":
        raise ModelError(
            f"{folder}/config.json: model_type is '{model_type}', expected 'llava': "
            "use a LlavaForConditionalGeneration checkpoint"
        )
    try:
        return LlavaConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ModelError(f"{folder}/config.json: invalid LLaVA configuration: {first_line(error)}") from error


def image_tokens(config: LlavaConfig) -> int:
    """The number of tokens per image: the vision tower's patches, and its class and register tokens if kept.

    Errors: `ModelError` for an unknown kind of tower, or if `image_seq_length` says another number.
    """
    size, patch = config.vision_config.image_size, config.vision_config.patch_size
    if not isinstance(size, int) or not isinstance(patch, int) or not 0 < patch <= size:
        raise ModelError(f"vision_config: image_size {size} and patch_size {patch} do not fit together")
    # Patches as a convolution without padding cuts them; "default" drops the first token, whatever that is.
    count = (size // patch) ** 2 + extra_tokens(config) - (config.vision_feature_select_strategy == "default")
    # transformers does not use this figure, so checkpoints with towers other than CLIP leave it at its default.
    unset = config.image_seq_length == _DEFAULT_SEQ_LENGTH and config.vision_config.model_type != "clip_vision_model"
    if config.image_seq_length != count and not unset:
        raise ModelError(
            f"config.json: image_seq_length is {config.image_seq_length}, but a {config.vision_config.model_type} of "
            f"{size} pixels with patches of {patch} gives {count} image tokens: set image_seq_length to {count} or use "
            "the matching tower"
        )
    return int(count)


def sequence_encoder(
    source: Path | LlavaConfig, tokenizer: PreTrainedTokenizerFast, template: Template, max_length: int
) -> SequenceEncoder:
    """Make the encoder that turns samples into this model's sequences; `source` is its folder or configuration.

    Errors: `ModelError` if model and tokenizer have different image tokens.
    """
    config = load_config(source) if isinstance(source, Path) else source
    image_token_id = int(config.image_token_index)
    named = tokenizer.get_vocab().get(IMAGE_PLACEHOLDER)
    if image_token_id >= len(tokenizer) or named not in (None, image_token_id):
        raise ModelError(
            f"config.json: image_token_index is {image_token_id}, but the tokenizer "
            + (f"has '{IMAGE_PLACEHOLDER}' at {named}" if named is not None else f"has {len(tokenizer)} tokens")
            + ": use the tokenizer that belongs to the checkpoint"
        )
    return SequenceEncoder(
        tokenizer, template, image_token_id=image_token_id, image_tokens=image_tokens(config), max_length=max_length
    )


def read_image_processor(folder: Path) -> dict[str, Any] | None:
    """The settings of a folder's image processor, from the file that transformers reads; None if it has none."""
    for name in ("processor_config.json", IMAGE_PROCESSOR_FILE):
        if (folder / name).is_file():
            content = read_json(folder, name)
            settings = content if name == IMAGE_PROCESSOR_FILE else content.get("image_processor")
            if isinstance(settings, dict):
                return settings
    return None


def check_image_size(folder: Path, settings: dict[str, Any] | None, config: LlavaConfig) -> None:
    """Reject an image processor whose images are not of the tower's size."""
    size = config.vision_config.image_size
    if settings is None:
        return
    for switch, name in (("do_center_crop", "crop_size"), ("do_resize", "size")):
        given = settings.get(name)
        if not settings.get(switch, given is not None) or given is None:
            continue
        whole = isinstance(given, dict) and "height" in given
        sides = {given} if isinstance(given, int) else {given["height"], given.get("width")} if whole else {size}
        if sides != {size}:
            raise ModelError(
                f"{folder}: the image processor's {name} {given} does not fit the vision tower's {size} pixels: "
                f"copy the {IMAGE_PROCESSOR_FILE} that belongs to the tower"
            )
        return  # an image that is cropped may first be resized to more
