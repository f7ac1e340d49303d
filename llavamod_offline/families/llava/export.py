"""Write a LLaVA as a folder that other tools load and prompt as this project does: plain transformers (4, 5) and vLLM.

config.json               RoPE's settings also under their names in transformers 4
tokenizer_config.json     pads on the left; the template's end token; also the names that transformers 4 reads
generation_config.json    greedy, up to the template's end token, without the ids that no answer may contain
chat_template.jinja       the template
preprocessor_config.json  LLaVA's image processor, which pads images to squares for the image aspect "pad"
processor_config.json     how many tokens an image takes
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llavamod_offline.data.encode.chat_template import CHAT_TEMPLATE_NAME, to_jinja
from llavamod_offline.data.encode.template import Template
from llavamod_offline.data.images import processor_settings
from llavamod_offline.errors import ModelError
from llavamod_offline.families.llava.checkpoint import IMAGE_PROCESSOR_FILE, check_image_size, read_image_processor
from llavamod_offline.families.llava.towers import extra_tokens
from llavamod_offline.models.export import (
    edit_json,
    generation_settings,
    readable_tokenizer,
    write_checkpoint,
    write_json,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_END_TOKENS = ("<|im_end|>", "<|endoftext|>")


def save_llava(
    model: LlavaForConditionalGeneration,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerFast,
    processor_source: Path,
    state_dict: dict[str, Tensor] | None = None,
    card: str | None = None,
    template: Template | None = None,
    image_aspect: str | None = None,
) -> None:
    """Write a complete checkpoint folder, atomically, that plain transformers (4 and 5) and vLLM load.

    `processor_source` is a checkpoint folder whose image processor is copied. `state_dict` replaces the model's own
    tensors if an engine has sharded them; `card` is written to README.md. `template` and `image_aspect` are those of
    the student's training, with which other tools then prompt it; None keeps the tokenizer's and the image processor's
    own.
    Errors: `ModelError` if `folder` exists, or `processor_source` has no image processor that fits the model.
    """
    settings = read_image_processor(processor_source)
    if settings is None:
        raise ModelError(f"{processor_source}: no {IMAGE_PROCESSOR_FILE}: use a folder with an image processor")
    check_image_size(processor_source, settings, model.config)
    _complete_generation_config(model, tokenizer)
    complete = partial(
        _write_settings,
        config=model.config,
        tokenizer=tokenizer,
        image_processor=settings,
        template=template,
        image_aspect=image_aspect,
    )
    write_checkpoint(model, folder, tokenizer=tokenizer, state_dict=state_dict, card=card, complete=complete)


def _complete_generation_config(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    """Stop generation at the end tokens that are configured, by default those in the vocabulary."""
    generation, vocabulary = model.generation_config, tokenizer.get_vocab()
    if generation.eos_token_id is None:
        named = [vocabulary[token] for token in _END_TOKENS if token in vocabulary]
        generation.eos_token_id = named or tokenizer.eos_token_id
    if generation.pad_token_id is None:
        generation.pad_token_id = vocabulary.get("<|endoftext|>", tokenizer.pad_token_id)


def _write_settings(
    folder: Path,
    *,
    config: LlavaConfig,
    tokenizer: PreTrainedTokenizerFast,
    image_processor: Mapping[str, Any],
    template: Template | None,
    image_aspect: str | None,
) -> None:
    """Complete a folder to which model and tokenizer were saved.

    None as `template` keeps the chat template and the end tokens, None as `image_aspect` the image processor.
    """
    edit_json(folder / "config.json", _config)
    edit_json(folder / "tokenizer_config.json", lambda settings: _tokenizer_settings(settings, template))
    if template is not None:
        rows, image = int(config.text_config.vocab_size), int(config.image_token_index)
        generation = generation_settings(tokenizer, template, image_token_id=image, rows=rows)
        write_json(folder / "generation_config.json", generation)
        (folder / CHAT_TEMPLATE_NAME).write_text(to_jinja(template), encoding="utf-8")
    images = image_processor if image_aspect is None else processor_settings(image_processor, image_aspect)
    write_json(folder / "preprocessor_config.json", images)
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": tokenizer.convert_ids_to_tokens(config.image_token_index),
        "num_additional_image_tokens": extra_tokens(config),  # the "default" strategy removes one
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }
    write_json(folder / "processor_config.json", processor)


def _config(settings: dict[str, Any]) -> dict[str, Any]:
    text = settings["text_config"]
    rope = dict(text.get("rope_parameters") or {})
    named = {"rope_theta": rope.pop("rope_theta")} if "rope_theta" in rope else {}
    if rope.get("rope_type", "default") != "default":
        named["rope_scaling"] = rope
    return settings | {"text_config": text | named}


def _tokenizer_settings(settings: dict[str, Any], template: Template | None) -> dict[str, Any]:
    # transformers 4 returns token type ids unless told otherwise, and then refuses them in `generate`.
    settings = readable_tokenizer(settings) | {"model_input_names": ["input_ids", "attention_mask"]}
    if template is not None:
        settings["eos_token"] = template.end
        settings["pad_token"] = settings.get("pad_token") or template.end
        settings.pop("chat_template", None)
    return settings
