"""Write a student as a checkpoint folder that other tools load and prompt as this project does: what families share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping

from llavamod_offline.data.encode.template import Template
from llavamod_offline.errors import ModelError
from llavamod_offline.models.checkpoint import id_count, quietly
from llavamod_offline.storage import atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def write_checkpoint(
    model: Any,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerFast,
    state_dict: dict[str, Tensor] | None,
    card: str | None,
    complete: Callable[[Path], None],
) -> None:
    """Write weights, tokenizer and `card` (its README.md); `complete` then adds the rest. Atomic.

    `state_dict` replaces the model's own tensors if an engine has sharded them.
    Errors: `ModelError` if `folder` exists.
    """
    if folder.exists():
        raise ModelError(f"{folder}: exists already: choose another folder or remove it")
    # Tensors get the names of published checkpoints, which transformers 4 and vLLM know, whatever the model came from.
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    with atomic.new_folder(folder) as aside, quietly():
        with redirect_stdout(sys.stderr):  # it may import DeepSpeed, which logs to stdout from then on
            model.save_pretrained(aside, state_dict=state_dict)
        tokenizer.save_pretrained(aside)
        if card is not None:
            (aside / "README.md").write_text(card, encoding="utf-8")
        complete(aside)


def generation_settings(
    tokenizer: PreTrainedTokenizerFast, template: Template, *, image_token_id: int | None, rows: int
) -> dict[str, Any]:
    """Greedy decoding up to the template's end, without image tokens or LM head `rows` beyond the tokenizer."""
    end = tokenizer.get_vocab()[template.end]
    image = [] if image_token_id is None else [image_token_id]
    never = [*image, *range(id_count(tokenizer), rows)]
    return {"do_sample": False, "eos_token_id": end, "pad_token_id": end, "suppress_tokens": never}


def readable_tokenizer(settings: dict[str, Any]) -> dict[str, Any]:
    """`tokenizer_config.json` with names that transformers 4 also reads, and padding on the left.

    Generation in batches continues after the last token, which must not be padding.
    """
    settings = settings | {"padding_side": "left"}
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    return settings


def edit_json(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change a file's JSON object."""
    write_json(file, change(json.loads(file.read_text(encoding="utf-8"))))


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object as transformers does."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
