"""The families of checkpoints that can teach, one module each; `open_teacher` finds the one of a folder."""

from __future__ import annotations

from pathlib import Path

from llavamod_offline.data.template import Template
from llavamod_offline.errors import ModelError
from llavamod_offline.models.checkpoint import read_json
from teacher_cache.teachers.protocol import Picture, Teacher

__all__ = ["Picture", "Teacher", "open_teacher"]


def open_teacher(folder: Path, template: Template, *, image_aspect: str, max_length: int) -> Teacher:
    """Open a checkpoint folder, all but its weights. Errors: `ModelError` if it is of no family that is known."""
    model_type = read_json(folder, "config.json").get("model_type")
    if model_type == "llava":
        from teacher_cache.teachers.llava import LlavaTeacher

        return LlavaTeacher(folder, template, image_aspect=image_aspect, max_length=max_length)
    raise ModelError(
        f"{folder}/config.json: model_type is '{model_type}', expected 'llava': "
        "give the folder of a LlavaForConditionalGeneration checkpoint"
    )
