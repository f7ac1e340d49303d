"""Read the common parts of a checkpoint folder; anything that transformers raises becomes one line."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.data.images import DECODER, read_processor_settings
from llavamod_offline.data.sample import Sample
from llavamod_offline.errors import ConfigError, DataError, ModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BY_SIZE = "by size"
OTHER = "choose another checkpoint"


def read_config(config_class: Any, folder: Path) -> Any:
    """Read a folder's configuration as one class. Errors: `ModelError` if it is unusable."""
    try:
        return config_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{folder}/config.json: not usable: {first_line(error)}") from error


def longrope_from(config: Any) -> int | None:
    """The length beyond which a model's positions depend on the longest sequence of a batch; None if they never do.

    transformers' `longrope` (Phi-3.5, Phi-4-mini) uses other factors for a whole batch if one sequence is longer.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    for part in (rope, *(inner for inner in rope.values() if isinstance(inner, dict))):
        if part.get("rope_type") == "longrope":
            own = part.get("original_max_position_embeddings")
            return int(own or getattr(text, "original_max_position_embeddings", 0) or context_length(text))
    return None


def joins(family: Any) -> bool:
    """Whether sequences of a family may share a batch: its processor can, and none changes another's positions."""
    from transformers import AutoConfig

    longest = longrope_from(read_config(AutoConfig, family.folder)) if family.batches else None
    return bool(family.batches) and (longest is None or family.encoder.max_length <= longest)


def read_processor(processor_class: Any, names: tuple[str, ...], folder: Path) -> Any:
    """Read a folder's image processor as one class, the PIL variant. Errors: `ModelError` for another kind."""
    file, settings = read_processor_settings(folder)
    kind = settings.get("image_processor_type", settings.get("feature_extractor_type"))
    if kind not in names:
        raise ModelError(f"{file}: image processor '{kind}' is none of {', '.join(names)}")
    settings = {key: value for key, value in settings.items() if not key.endswith("_type")}
    try:
        return processor_class.from_dict(settings)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{file}: {first_line(error)}") from error


def token_id(tokenizer: PreTrainedTokenizerFast, token: str, named: int | None, field: str) -> int:
    """The id of a special token. Errors: `ModelError` if tokenizer and configuration (`named`) disagree on it."""
    found = tokenizer.get_vocab().get(token)
    if found is None or named not in (None, found):
        raise ModelError(
            f"{tokenizer.name_or_path}/config.json: {field} is {named}, but the tokenizer "
            + (f"has no token '{token}'" if found is None else f"has '{token}' at {found}")
            + ": use the tokenizer that belongs to the checkpoint"
        )
    return int(found)


def context_length(text_config: Any) -> int:
    """The most tokens that a language model takes, according to its configuration."""
    return int(getattr(text_config, "max_position_embeddings", 0) or sys.maxsize)


def own_aspect(aspect: str, family: str) -> bool:
    """Whether images are first padded to squares. Errors: `ConfigError` for an aspect the family does not support."""
    if aspect == "square":
        raise ConfigError(
            f"image_aspect is 'square', but {family} takes images of any shape: set auto, or pad to pad them"
        )
    return aspect == "pad"


@contextmanager
def preparing(sample: Sample) -> Iterator[None]:
    """Turn anything that an image processor raises into a `DataError` naming the sample."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"sample '{sample.key}': its image cannot be prepared: {first_line(error)}") from error


def pixel_array(pixels: Any, sample: Sample) -> NDArray[np.float32]:
    """An image processor's pixels as float32. Errors: `DataError` naming the sample unless all are finite."""
    array = np.asarray(pixels, np.float32)
    if not np.isfinite(array).all():
        raise DataError(f"sample '{sample.key}': its image's pixels are not finite")
    return array


def plain(value: Any) -> Any:
    """A processor's setting as JSON values."""
    if value is None:
        return None
    for kind in (bool, str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return {str(name): plain(item) for name, item in dict(value).items() if item is not None}


def describe_processor(processor: Any, names: Iterable[str], *, padded: bool, token_id: int | None) -> dict[str, Any]:
    """`Family.describe_images` of a family whose image tokens depend on the image's size."""
    settings = {name: plain(getattr(processor, name)) for name in names}
    return {
        "aspect": "pad" if padded else "own",
        "decoder": DECODER,
        **settings,
        "tokens": BY_SIZE,
        "token_id": token_id,
    }
