"""The settings by which other tools load an exported student and ask it as this project does.

config.json               RoPE's settings also by their names in transformers 4
tokenizer_config.json     pads on the left; the template's end token; names that transformers 4 reads, too
generation_config.json    greedy, up to the template's end token, without the ids that no answer may contain
chat_template.jinja       the template
preprocessor_config.json  LLaVA's image processor, which pads images to squares for the image aspect "pad"
processor_config.json     how many tokens an image takes
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavamod_offline.data.encode.chat_template import CHAT_TEMPLATE_NAME, to_jinja
from llavamod_offline.data.encode.template import Template
from llavamod_offline.data.images import processor_settings
from llavamod_offline.models.towers import extra_tokens

if TYPE_CHECKING:
    from transformers import LlavaConfig, PreTrainedTokenizerFast


def never_answers(config: LlavaConfig, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids that no answer may contain: the image token, and rows of the LM head beyond the tokenizer."""
    return [int(config.image_token_index), *range(len(tokenizer), int(config.text_config.vocab_size))]


def write_settings(
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
    _edit(folder / "config.json", _config)
    _edit(folder / "tokenizer_config.json", lambda settings: _tokenizer_settings(settings, template))
    if template is not None:
        end = tokenizer.get_vocab()[template.end]
        generation = {"do_sample": False, "eos_token_id": end, "pad_token_id": end}
        _write(folder / "generation_config.json", generation | {"suppress_tokens": never_answers(config, tokenizer)})
        (folder / CHAT_TEMPLATE_NAME).write_text(to_jinja(template), encoding="utf-8")
    images = image_processor if image_aspect is None else processor_settings(image_processor, image_aspect)
    _write(folder / "preprocessor_config.json", images)
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": tokenizer.convert_ids_to_tokens(config.image_token_index),
        "num_additional_image_tokens": extra_tokens(config),  # the "default" strategy removes one
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }
    _write(folder / "processor_config.json", processor)


def _config(settings: dict[str, Any]) -> dict[str, Any]:
    text = settings["text_config"]
    rope = dict(text.get("rope_parameters") or {})
    named = {"rope_theta": rope.pop("rope_theta")} if "rope_theta" in rope else {}
    if rope.get("rope_type", "default") != "default":
        named["rope_scaling"] = rope
    return settings | {"text_config": text | named}


def _tokenizer_settings(settings: dict[str, Any], template: Template | None) -> dict[str, Any]:
    # Generation in batches continues after the last token, which must not be padding.
    # transformers 4 gives token type ids unless told otherwise, and then refuses them in `generate`.
    settings = settings | {"padding_side": "left", "model_input_names": ["input_ids", "attention_mask"]}
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    if template is not None:
        settings["eos_token"] = template.end
        settings["pad_token"] = settings.get("pad_token") or template.end
        settings.pop("chat_template", None)
    return settings


def _edit(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    _write(file, change(json.loads(file.read_text(encoding="utf-8"))))


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
