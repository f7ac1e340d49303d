"""The answer engines by name. To add one, write a module with a class like `HfEngine` and list it below.

The class implements `AnswerEngine`; its constructor takes the arguments of `open_engine`. It is imported when used.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Literal, cast

from eval.engines.protocol import AnswerEngine

AnswerEngineName = Literal["hf", "vllm", "processor"]

ENGINES: dict[str, tuple[str, str]] = {
    "hf": ("hf", "HfEngine"),
    "vllm": ("vllm", "VllmEngine"),
    "processor": ("processor", "ProcessorEngine"),
}


def open_engine(name: str, folder: Path, *, template: str, image_aspect: str, dtype: str, device: str) -> AnswerEngine:
    """Load the checkpoint `folder` in the engine `name`. Errors: see the engine."""
    module, kind = ENGINES[name]
    opened = getattr(import_module(f"eval.engines.{module}"), kind)
    return cast(
        "AnswerEngine", opened(folder, template=template, image_aspect=image_aspect, dtype=dtype, device=device)
    )
