"""Writing a LLaVA student's folder as an export of `train-student`, so that other tools prompt it as this project does.

For students of earlier versions or from elsewhere; the settings are those of `llavamod_offline.models.export`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from llavamod_offline.data.encode.chat_template import choose_template
from llavamod_offline.data.images import ASPECTS, AUTO_ASPECT, ImagePreprocessor
from llavamod_offline.errors import ConfigError, ModelError
from llavamod_offline.families import is_llava
from llavamod_offline.families.llava.checkpoint import load_config, load_llava, sequence_encoder
from llavamod_offline.families.llava.export import save_llava
from llavamod_offline.models.checkpoint import load_tokenizer


def write_portable(student: Path, output: Path, *, template: str = "auto", image_aspect: str = AUTO_ASPECT) -> None:
    """Write a copy of the folder `student` with the `template` and `image_aspect` of its training.

    Errors: `ConfigError` for the template, the aspect, or an existing `output`; `ModelError` for the student.
    """
    if image_aspect not in (AUTO_ASPECT, *ASPECTS):
        choices = ", ".join((AUTO_ASPECT, *ASPECTS))
        raise ConfigError(f"image aspect '{image_aspect}' is unknown: choose one of {choices}")
    if output.exists():
        raise ConfigError(f"{output}: already exists: name a new folder")
    if not is_llava(student):
        raise ModelError(
            f"{student}: it is not a LLaVA, and its own processor and chat template say how to "
            "prompt it: use it as it is"
        )
    images = ImagePreprocessor.from_checkpoint(student, image_aspect)
    config, tokenizer = load_config(student), load_tokenizer(student)
    wording = choose_template(template, lambda: tokenizer)
    sequence_encoder(config, tokenizer, wording, int(config.text_config.max_position_embeddings))
    card = student / "README.md"
    save_llava(
        load_llava(student, dtype=config.dtype or torch.float32),
        output,
        tokenizer=tokenizer,
        processor_source=student,
        card=card.read_text(encoding="utf-8") if card.is_file() else None,
        template=wording,
        image_aspect=images.aspect,
    )
