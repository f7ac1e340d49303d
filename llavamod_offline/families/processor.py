"""Load a checkpoint's own processor; it resizes images with Pillow, and its part for videos is left out.

Code in a checkpoint's folder is never run.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llavamod_offline.data.images import read_processor_settings
from llavamod_offline.errors import ConfigError, ModelError, first_line
from llavamod_offline.models.checkpoint import load_tokenizer, read_json

_CLASS_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def load_processor(folder: Path, config: Any) -> Any:
    """The processor that transformers has for a folder, with the folder's tokenizer and chat template.

    Errors: `ModelError` if there is none or it cannot be loaded; `ConfigError` if it needs torchvision.
    """
    with loading(folder):
        kind = _processor_class(folder, config)
        settings, rest = kind.get_processor_dict(folder, local_files_only=True)
        parts = [_part(name, folder, config) for name in kind.get_attributes()]
        # transformers checks the parts' classes, and does not allow for one that is left out.
        made: Any = type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda *_: None})
        processor = made.from_args_and_dict(parts, settings, **rest)
    processor.chat_template = processor.tokenizer.chat_template
    return processor


@contextlib.contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Turn any error of transformers over a processor into one line: `ModelError`, `ConfigError` for torchvision."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        if "torchvision" in str(error).lower() or (
            "image processor class" in str(error) and importlib.util.find_spec("torchvision") is None
        ):
            raise ConfigError(
                f"{folder}: its processor needs torchvision: pip install 'llavamod-offline[processor]'"
            ) from error
        raise ModelError(f"{folder}: its processor cannot be loaded: {first_line(error)}") from error


def _processor_class(folder: Path, config: Any) -> Any:
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    named = [read_json(folder, name).get("processor_class") for name in _CLASS_FILES if (folder / name).is_file()]
    name = next((name for name in named if name), None)
    known = type(config) in PROCESSOR_MAPPING
    kind = getattr(transformers, name, None) if name else PROCESSOR_MAPPING[type(config)] if known else None
    if kind is None:
        raise ModelError(
            f"{folder}: transformers has no processor {name or f'for model_type {config.model_type}'}, and code in the "
            "folder is never run: choose another checkpoint"
        )
    # SmolVLM's requires a package that it uses only for videos.
    module: Any = importlib.import_module(kind.__module__)
    if hasattr(module, "num2words") and module.num2words is None:
        module.num2words = str
    return kind


def _part(name: str, folder: Path, config: Any) -> Any:
    from transformers import AutoFeatureExtractor

    if name == "tokenizer":
        return load_tokenizer(folder)
    if name == "image_processor":
        return _image_processor_class(folder, config).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    if name == "feature_extractor":  # for audio, which no sample has
        with contextlib.suppress(OSError, ValueError):
            return AutoFeatureExtractor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return None


def _image_processor_class(folder: Path, config: Any) -> Any:
    """The class that resizes with Pillow; else the automatic one, which needs torchvision."""
    from transformers.models.auto import image_processing_auto as auto

    _, settings = read_processor_settings(folder)
    kind = settings.get("image_processor_type", settings.get("feature_extractor_type"))
    if kind is None:
        wanted = auto.IMAGE_PROCESSOR_MAPPING_NAMES.get(config.model_type, {}).get("pil")
    else:
        wanted = f"{str(kind).removesuffix('Fast').removesuffix('Pil')}Pil"
    for model_type, classes in auto.IMAGE_PROCESSOR_MAPPING_NAMES.items():
        # Not by name alone: without torchvision, transformers hides some classes that do not need it.
        name = auto.model_type_to_module_name(model_type)
        module = f"transformers.models.{name}.image_processing_pil_{name}"
        if classes.get("pil") == wanted is not None and importlib.util.find_spec(module) is not None:
            return getattr(importlib.import_module(module), wanted)
    return auto.AutoImageProcessor
