"""Copying a student's folder so that other tools prompt it as this project does: lmms-eval, chat servers, pipelines.

The copy has the student's weights and tokenizer. These files carry this project's settings to other tools:
  chat_template.jinja      the template that the student was trained with
  preprocessor_config.json for `image_aspect` "pad", LLaVA's image processor, which first pads an image to a square
  tokenizer_config.json, generation_config.json   the template's end token
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from llavamod_offline.data.encode.chat_template import CHAT_TEMPLATE_NAME, choose_template, to_jinja
from llavamod_offline.data.images import ASPECTS, ImagePreprocessor, read_processor_settings
from llavamod_offline.errors import ConfigError
from llavamod_offline.models.checkpoint import load_tokenizer, read_json
from llavamod_offline.storage.atomic import new_folder


def write_portable(student: Path, output: Path, *, template: str = "qwen", image_aspect: str = "pad") -> None:
    """Write a portable copy of the folder `student`, with hard links where possible.

    Errors: `ConfigError` for the template, the aspect, or an existing `output`; `ModelError` for the student.
    """
    wording = choose_template(template, lambda: load_tokenizer(student))
    if image_aspect not in ASPECTS:
        raise ConfigError(f"image aspect '{image_aspect}' is unknown: choose one of {', '.join(ASPECTS)}")
    if output.exists():
        raise ConfigError(f"{output}: already exists: name a new folder")
    ImagePreprocessor.from_checkpoint(student, image_aspect)
    _, images = read_processor_settings(student)
    if image_aspect == "pad":
        images |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    end = load_tokenizer(student).convert_tokens_to_ids(wording.end)
    changed = {
        "preprocessor_config.json": images,
        "tokenizer_config.json": read_json(student, "tokenizer_config.json")
        | {"eos_token": wording.end, "padding_side": "left"},
        "generation_config.json": read_json(student, "generation_config.json") | {"eos_token_id": end},
        "processor_config.json": read_json(student, "processor_config.json"),
    }
    changed["tokenizer_config.json"].pop("chat_template", None)
    changed["processor_config.json"].pop("image_processor", None)
    with new_folder(output) as aside:
        for file in student.iterdir():
            if file.is_file() and file.name not in changed and not file.name.startswith("chat_template"):
                _link(file, aside / file.name)
        for name, content in changed.items():
            (aside / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (aside / CHAT_TEMPLATE_NAME).write_text(to_jinja(wording), encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
