"""Load models from standard Hugging Face folders, using local files only.

Missing, unexpected and mis-shaped tensors are errors here, although transformers only warns about them: a model with
randomly initialised weights must never be trained or evaluated.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoTokenizer

from llavamod_offline.errors import ModelError, first_line
from llavamod_offline.models.hub import weight_files
from llavamod_offline.models.loading.adapter import merge_adapter
from llavamod_offline.models.loading.quantised import cannot_load, quantisation
from llavamod_offline.plural import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_LOG = logging.getLogger(__name__)


def load_weights(model_class: Any, folder: Path, *, dtype: torch.dtype, **settings: Any) -> Any:
    """Load a model of `model_class` from a folder of safetensors files; an adapter is merged into its base.

    Errors: `ModelError` if a tensor is missing, unexpected, mis-shaped or unreadable; `ConfigError` if the weights are
    quantised, or the adapter needs a package.
    """
    weight_files(folder)
    method = quantisation(folder)
    try:
        with quietly():
            model, info = model_class.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `_check_complete` names them
                **settings,
            )
    except (OSError, RuntimeError, ValueError, KeyError, ImportError, SafetensorError) as error:
        if method is not None:
            raise cannot_load(folder, method, error) from error
        if isinstance(error, ImportError):
            raise
        raise ModelError(f"{folder}: the weights cannot be loaded: {first_line(error)}: copy them again") from error
    _check_complete(info, str(folder))
    _untie(model, folder)
    return merge_adapter(model, folder).eval()


def load_tensors(
    model_class: Any, config: Any, tensors: dict[str, Tensor], *, dtype: torch.dtype, any_shape: bool = False
) -> Any:
    """Make a model of `model_class` from named tensors, which it may share; in evaluation mode.

    Errors: `ModelError` if a tensor is missing, unexpected or, unless `any_shape`, mis-shaped.
    """
    try:
        with quietly():
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
    _check_complete(info | {"mismatched_keys": []} if any_shape else info, "tensors")
    return model.eval()


def _check_complete(info: dict[str, Any], where: str) -> None:
    """Reject a model unless all its tensors, and no others, were loaded."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info[kind])
        if names:
            reason = "config.json and the weights belong to different models, or a file is incomplete"
            if kind == "missing_keys" and names == ["lm_head.weight"]:
                reason = (
                    "config.json does not tie it to the embeddings (tie_word_embeddings), and no file has it: set "
                    "tie_word_embeddings to true if the model was trained that way, or copy the weights again"
                )
            count = counted(len(names), kind.replace("_keys", "") + " tensor")
            raise ModelError(f"{where}: {count}, first '{names[0]}': {reason}")


def _untie(model: Any, folder: Path) -> None:
    """Correct a model's configuration if it ties the LM head to the embeddings although the weights hold another.

    transformers uses such a head, but goes by the configuration when saving and copying a model.
    """
    said = model.get_expanded_tied_weights_keys(all_submodels=True)
    untied = sorted(said.keys() - model.all_tied_weights_keys.keys())
    if not untied:
        return
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    _LOG.warning(
        "%s: config.json ties '%s' to '%s' (tie_word_embeddings), but the weights hold both, and they differ: both are "
        "used, as transformers does; set tie_word_embeddings to false, or remove the first",
        *(folder, untied[0], said[untied[0]]),
    )


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """Open a safetensors file to read single tensors. Errors: `ModelError` if it cannot be read."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: cannot be read: {first_line(error)}: copy it again") from error


def check_folder(folder: Path) -> None:
    """Refuse a checkpoint's folder that does not exist. Errors: `ModelError`."""
    if folder.exists() and not folder.is_dir():
        raise ModelError(f"{folder}: a file, not a checkpoint folder")
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such checkpoint folder: name one, or a Hub id such as org/name")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load a folder's fast tokenizer, with the chat template that the folder's processor uses.

    Code in the folder is never run. Errors: `ModelError` if it is missing or cannot be loaded.
    """
    check_folder(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{folder}: no tokenizer.json: use a folder with a fast tokenizer")
    try:
        with quietly():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, mistral_format=False
            )
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{folder}/tokenizer_config.json: the tokenizer is made by code in the folder, which is never run: "
                "name a class of transformers there (tokenizer_class, without auto_map), or choose another checkpoint"
            ) from error
        raise ModelError(f"{folder}: the tokenizer cannot be loaded: {first_line(error)}") from error
    # Older checkpoints keep the processor's chat template apart from the tokenizer's.
    for name in ("processor_config.json", "chat_template.json"):
        if not (folder / "chat_template.jinja").is_file() and (folder / name).is_file():
            tokenizer.chat_template = read_json(folder, name).get("chat_template") or tokenizer.chat_template
    return cast("PreTrainedTokenizerFast", tokenizer)


def id_count(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the tokenizer's largest id; there may be gaps below it."""
    return int(max(tokenizer.get_vocab().values())) + 1


def vocabulary_size(tokenizer: PreTrainedTokenizerFast, *lm_head_rows: int) -> int:
    """The number of ids a distribution covers: the smallest of the tokenizer's id count and the LM heads' rows."""
    return min([id_count(tokenizer), *lm_head_rows])


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object of a checkpoint folder. Errors: `ModelError` if folder or file is missing or unreadable."""
    check_folder(folder)
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


@contextmanager
def quietly() -> Iterator[None]:
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
