"""Load and save LLaVA models as standard Hugging Face folders, using local files only.

Missing, unexpected and mis-shaped tensors are errors here, although transformers only warns about them: a model with
randomly initialised weights must never be trained or evaluated.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration
from transformers.conversion_mapping import get_model_conversion_mapping

from llavamod_offline.data.encode.template import Template
from llavamod_offline.data.encode.tokenize import SequenceEncoder
from llavamod_offline.data.sample import IMAGE_PLACEHOLDER
from llavamod_offline.errors import ModelError, first_line
from llavamod_offline.models.export import write_settings
from llavamod_offline.models.hub import weight_files
from llavamod_offline.models.towers import extra_tokens
from llavamod_offline.plural import counted
from llavamod_offline.storage import atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_END_TOKENS = ("<|im_end|>", "<|endoftext|>")
_IMAGE_PROCESSOR_FILE = "preprocessor_config.json"
_DEFAULT_SEQ_LENGTH = 576


def load_llava(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> LlavaForConditionalGeneration:
    """Load a LLaVA model with a dense or sparse text model, in evaluation mode, on the CPU, in `dtype`.

    `settings` are passed to `from_pretrained`.
    Errors: `ModelError` if `folder` is not a LLaVA checkpoint, a tensor is missing, unexpected, mis-shaped or
    unreadable, or the image processor does not fit the vision tower.
    """
    config = load_config(folder)
    image_tokens(config)
    _check_image_size(folder, _image_processor(folder), config)
    return cast(
        "LlavaForConditionalGeneration",
        load_weights(LlavaForConditionalGeneration, folder, dtype=dtype, config=config, **settings),
    )


def load_config(folder: Path) -> LlavaConfig:
    """Read a LLaVA folder's configuration. Errors: `ModelError` if it is missing or of another model type."""
    model_type = read_json(folder, "config.json").get("model_type")
    if model_type != "llava":
        raise ModelError(
            f"{folder}/config.json: model_type is '{model_type}', expected 'llava': "
            "use a LlavaForConditionalGeneration checkpoint"
        )
    try:
        return LlavaConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ModelError(f"{folder}/config.json: invalid LLaVA configuration: {first_line(error)}") from error


def load_weights(model_class: Any, folder: Path, *, dtype: torch.dtype, **settings: Any) -> Any:
    """Load a model of `model_class` from a folder of safetensors files.

    Errors: `ModelError` if a tensor is missing, unexpected, mis-shaped or unreadable.
    """
    weight_files(folder)
    try:
        with _quiet():
            model, info = model_class.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `_check_complete` names them
                **settings,
            )
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{folder}: the weights cannot be loaded: {first_line(error)}: copy them again") from error
    _check_complete(info, str(folder))
    return model.eval()


def load_tensors(model_class: Any, config: Any, tensors: dict[str, Tensor], *, dtype: torch.dtype) -> Any:
    """Make a model of `model_class` from named tensors, which it may share; in evaluation mode.

    Errors: `ModelError` if a tensor is missing, unexpected or mis-shaped.
    """
    try:
        with _quiet():
            model, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `_check_complete` names them
            )
    except (RuntimeError, ValueError, KeyError) as error:
        raise ModelError(f"the tensors do not fit the model: {first_line(error)}") from error
    _check_complete(info, "tensors")
    return model.eval()


def _check_complete(info: dict[str, Any], where: str) -> None:
    """Reject a model unless all its tensors, and no others, were loaded."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info[kind])
        if names:
            raise ModelError(
                f"{where}: {counted(len(names), kind.replace('_keys', '') + ' tensor')}, first '{names[0]}': "
                "config.json and the weights belong to different models, or a file is incomplete"
            )


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """Open a safetensors file to read single tensors. Errors: `ModelError` if it cannot be read."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: cannot be read: {first_line(error)}: copy it again") from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load a folder's fast tokenizer, with the chat template that the folder's processor uses.

    Errors: `ModelError` if it is missing or cannot be loaded.
    """
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{folder}: no tokenizer.json: use a folder with a fast tokenizer")
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ModelError(f"{folder}: the tokenizer cannot be loaded: {first_line(error)}") from error
    # Older checkpoints keep the processor's chat template apart from the tokenizer's.
    for name in ("processor_config.json", "chat_template.json"):
        if not (folder / "chat_template.jinja").is_file() and (folder / name).is_file():
            tokenizer.chat_template = read_json(folder, name).get("chat_template") or tokenizer.chat_template
    return cast("PreTrainedTokenizerFast", tokenizer)


def image_tokens(config: LlavaConfig) -> int:
    """The number of tokens per image: the vision tower's patches, and its class and register tokens if kept.

    Errors: `ModelError` for an unknown kind of tower, or if `image_seq_length` says another number.
    """
    size, patch = config.vision_config.image_size, config.vision_config.patch_size
    if not isinstance(size, int) or not isinstance(patch, int) or not 0 < patch <= size:
        raise ModelError(f"vision_config: image_size {size} and patch_size {patch} do not fit together")
    # As a convolution without padding cuts it; "default" drops the first token, whatever that is.
    count = (size // patch) ** 2 + extra_tokens(config) - (config.vision_feature_select_strategy == "default")
    # transformers does not use this figure, so checkpoints with other towers than CLIP leave it at its default.
    unset = config.image_seq_length == _DEFAULT_SEQ_LENGTH and config.vision_config.model_type != "clip_vision_model"
    if config.image_seq_length != count and not unset:
        raise ModelError(
            f"config.json: image_seq_length is {config.image_seq_length}, but a {config.vision_config.model_type} of "
            f"{size} pixels with patches of {patch} gives {count} image tokens: set image_seq_length to {count} or use "
            "the matching tower"
        )
    return int(count)


def sequence_encoder(
    source: Path | LlavaConfig, tokenizer: PreTrainedTokenizerFast, template: Template, max_length: int
) -> SequenceEncoder:
    """Make the encoder that turns samples into this model's sequences; `source` is its folder or configuration.

    Errors: `ModelError` if model and tokenizer have different image tokens.
    """
    config = load_config(source) if isinstance(source, Path) else source
    image_token_id = int(config.image_token_index)
    named = tokenizer.get_vocab().get(IMAGE_PLACEHOLDER)
    if image_token_id >= len(tokenizer) or named not in (None, image_token_id):
        raise ModelError(
            f"config.json: image_token_index is {image_token_id}, but the tokenizer "
            + (f"has '{IMAGE_PLACEHOLDER}' at {named}" if named is not None else f"has {len(tokenizer)} tokens")
            + ": use the tokenizer that belongs to the checkpoint"
        )
    return SequenceEncoder(
        tokenizer, template, image_token_id=image_token_id, image_tokens=image_tokens(config), max_length=max_length
    )


def vocabulary_size(tokenizer: PreTrainedTokenizerFast, *lm_head_rows: int) -> int:
    """The number of ids a distribution covers: the smallest of the tokenizer's size and the LM heads' rows."""
    return min([len(tokenizer), *lm_head_rows])


def save_student(
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
    the student's training, by which other tools then ask it; None keeps the tokenizer's and the image processor's own.
    Errors: `ModelError` if `folder` exists, or `processor_source` has no image processor that fits the model.
    """
    if folder.exists():
        raise ModelError(f"{folder}: exists already: choose another folder or remove it")
    settings = _image_processor(processor_source)
    if settings is None:
        raise ModelError(f"{processor_source}: no {_IMAGE_PROCESSOR_FILE}: use a folder with an image processor")
    _check_image_size(processor_source, settings, model.config)
    _complete_generation_config(model, tokenizer)
    # Tensors get the names of published checkpoints, which transformers 4 and vLLM know, whatever the model came from.
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    with atomic.new_folder(folder) as aside, _quiet():
        with redirect_stdout(sys.stderr):  # it may import DeepSpeed, which logs to stdout from then on
            model.save_pretrained(aside, state_dict=state_dict)
        tokenizer.save_pretrained(aside)
        if card is not None:
            (aside / "README.md").write_text(card, encoding="utf-8")
        write_settings(
            aside,
            config=model.config,
            tokenizer=tokenizer,
            image_processor=settings,
            template=template,
            image_aspect=image_aspect,
        )


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object of a checkpoint folder. Errors: `ModelError` if folder or file is missing or unreadable."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such checkpoint folder")
    file = folder / name
    if not file.is_file():
        raise ModelError(f"{folder}: no {name}: use a Hugging Face checkpoint folder")
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ModelError(f"{file}: not readable as JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: expected a JSON object")
    return content


def _image_processor(folder: Path) -> dict[str, Any] | None:
    """The settings of a folder's image processor, from the file that transformers reads; None if it has none."""
    for name in ("processor_config.json", _IMAGE_PROCESSOR_FILE):
        if (folder / name).is_file():
            content = read_json(folder, name)
            settings = content if name == _IMAGE_PROCESSOR_FILE else content.get("image_processor")
            if isinstance(settings, dict):
                return settings
    return None


def _check_image_size(folder: Path, settings: dict[str, Any] | None, config: LlavaConfig) -> None:
    """Reject an image processor whose images are not of the tower's size."""
    size = config.vision_config.image_size
    if settings is None:
        return
    for switch, name in (("do_center_crop", "crop_size"), ("do_resize", "size")):
        given = settings.get(name)
        if not settings.get(switch, given is not None) or given is None:
            continue
        whole = isinstance(given, dict) and "height" in given
        sides = {given} if isinstance(given, int) else {given["height"], given.get("width")} if whole else {size}
        if sides != {size}:
            raise ModelError(
                f"{folder}: the image processor's {name} {given} does not fit the vision tower's {size} pixels: "
                f"copy the {_IMAGE_PROCESSOR_FILE} that belongs to the tower"
            )
        return  # what is cropped may be resized to more


def _complete_generation_config(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    """Stop generation at the end tokens that are configured, by default those in the vocabulary."""
    generation, vocabulary = model.generation_config, tokenizer.get_vocab()
    if generation.eos_token_id is None:
        named = [vocabulary[token] for token in _END_TOKENS if token in vocabulary]
        generation.eos_token_id = named or tokenizer.eos_token_id
    if generation.pad_token_id is None:
        generation.pad_token_id = vocabulary.get("<|endoftext|>", tokenizer.pad_token_id)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars and load report; real problems are raised as errors."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # A sparse Qwen2 without `residual` has a shared expert of size 0.
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
