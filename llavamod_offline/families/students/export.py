"""Write a student of a family other than LLaVA as a folder that other tools load and prompt as this project does.

tokenizer_config.json     pads on the left; also the names that transformers 4 reads
generation_config.json    greedy, up to the template's end token, without the ids that no answer may contain
chat_template.jinja       the template it was trained with, images written as its processor expects them
and the processor's own settings, unchanged.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from llavamod_offline.data.encode.chat_template import CHAT_TEMPLATE_NAME, to_jinja
from llavamod_offline.families.image_text import PALIGEMMA
from llavamod_offline.families.protocol import Family
from llavamod_offline.models.export import edit_json, generation_settings, readable_tokenizer, write_checkpoint

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_CHAT_TEMPLATE = "chat_template"  # its older place, in a processor's file, where it would override ours


def save_whole(
    model: Any, folder: Path, *, family: Family, state_dict: dict[str, Tensor] | None, card: str | None
) -> None:
    """Write a complete checkpoint folder, atomically. `family`: of the checkpoint that training began with.

    Errors: `ModelError` if `folder` exists.
    """
    encoder = family.encoder
    settings = generation_settings(
        encoder.tokenizer, encoder.template, image_token_id=family.image_token_id, rows=family.head_rows
    )
    model.generation_config = GenerationConfig(**settings)
    complete = partial(_complete, family=family)
    write_checkpoint(model, folder, tokenizer=encoder.tokenizer, state_dict=state_dict, card=card, complete=complete)


def _complete(folder: Path, *, family: Family) -> None:
    edit_json(folder / "tokenizer_config.json", readable_tokenizer)
    if family.encoder.template.name != PALIGEMMA:  # which has no chat template
        wording = to_jinja(family.encoder.template, image=family.written)
        (folder / CHAT_TEMPLATE_NAME).write_text(wording, encoding="utf-8")
    for name in _PROCESSOR_FILES:
        if (family.folder / name).is_file():
            shutil.copyfile(family.folder / name, folder / name)
            edit_json(folder / name, lambda content: {key: content[key] for key in content if key != _CHAT_TEMPLATE})
