"""PEFT adapters on a base checkpoint, opened as one checkpoint and merged on loading.

FOLDER/config.json, tokenizer, processor, weights   links to the base's files, or to those that the adapter brings
FOLDER/adapter/                                     links to adapter_config.json and adapter_model.safetensors
"""

from __future__ import annotations

import functools
import json
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llavamod_offline.errors import ConfigError, ModelError, first_line
from llavamod_offline.plural import counted

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PART = "adapter"
_BASE_KEY = "base_model_name_or_path"
_OF_BASE = ("config.json", CONFIG_NAME, WEIGHTS_NAME)  # an adapter's folder may hold a copy of the first
_TEMPLATES = {"chat_template.jinja", "chat_template.json"}
_SIZES = re.compile(r"size mismatch for (\S+): .*?(torch\.Size\(\[.*?\]\)).*?(torch\.Size\(\[.*?\]\))")
_MERGE = "merge it into its base first"


def is_adapter(folder: Path) -> bool:
    """Whether a folder, as its author saved it, holds an adapter."""
    return (folder / CONFIG_NAME).is_file()


def adapter_files(folder: Path) -> list[Path]:
    """Configuration and weights of the adapter in an opened folder; none if it has no adapter."""
    return [folder / _PART / name for name in (CONFIG_NAME, WEIGHTS_NAME)] if (folder / _PART).is_dir() else []


def describe_adapter(folder: Path) -> dict[str, Any] | None:
    """An opened folder's adapter settings without its base's name; None if it has no adapter."""
    if not (folder / _PART).is_dir():
        return None
    return {name: value for name, value in _read(folder / _PART / CONFIG_NAME).items() if name != _BASE_KEY}


@functools.cache
def with_base(folder: Path, find: Callable[[str], Path]) -> Path:
    """Open an adapter's folder with its base, which `find` finds by path or Hub id: a folder of links for this process.

    Errors: `ModelError` if a file or the base is missing, or if the folder holds more than an adapter.
    """
    config = folder / CONFIG_NAME
    if not (folder / WEIGHTS_NAME).is_file():
        raise ModelError(
            f"{folder}: it has {CONFIG_NAME}, but no {WEIGHTS_NAME} (others are never unpickled): save the adapter "
            "again with a current peft"
        )
    if any(folder.glob("model*.safetensors")):
        raise ModelError(f"{folder}: it holds a model and an adapter: remove {CONFIG_NAME}, or {_MERGE}")
    if (folder / "non_lora_trainables.bin").is_file():
        raise ModelError(
            f"{folder}: its projector is in non_lora_trainables.bin, which is never unpickled: {_MERGE}, with the "
            "software that trained it"
        )
    base = _base(folder, config, find)
    view = _scratch() / str(len(list(_scratch().iterdir()))) / folder.resolve().name
    (view / _PART).mkdir(parents=True)
    own = [file for kind in ("*.json", "*.jinja") for file in folder.glob(kind) if file.name not in _OF_BASE]
    names = {file.name: file for file in [*base.iterdir(), *own] if file.is_file()}
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and "chat_template" in _read(settings):  # which the base's files would override
        for name in _TEMPLATES - {file.name for file in own}:
            names.pop(name, None)
    for name, file in names.items():
        (view / name).symlink_to(file.resolve())
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (view / _PART / name).symlink_to((folder / name).resolve())
    return view


def merge_adapter(model: Any, folder: Path) -> Any:
    """Merge the adapter of an opened folder, if it has one, into its base's model.

    Errors: `ConfigError` if peft is not installed; `ModelError` if the adapter cannot be merged, or belongs to another
    base.
    """
    if not (folder / _PART).is_dir():
        return model
    name = f"{folder.name}/{CONFIG_NAME}"
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ConfigError(f"{name}: adapters need peft: pip install 'llavamod-offline[lora]'") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.PeftConfig.from_pretrained(str(folder / _PART))
            _check_kind(config, name)
            config.inference_mode = True
            adapted = peft.PeftModel(model, config)
            found = adapted.load_adapter(str(folder / _PART), "default", torch_device="cpu", use_safetensors=True)
            merged = adapted.merge_and_unload(safe_merge=True)
    except ModelError:
        raise
    except Exception as error:  # peft may raise anything
        if sizes := _SIZES.search(str(error)):
            tensor, own, of_base = (text.removeprefix("torch.Size") for text in sizes.groups())
            raise ModelError(
                f"{name}: the adapter cannot be merged into its base: '{tensor}' has the shape {own}, expected "
                f"{of_base}: give it the base that it was trained on, or, if tokens were added to that, {_MERGE}"
            ) from error
        raise ModelError(
            f"{name}: the adapter cannot be merged into its base: {first_line(error)}: give it the base that it was "
            "trained on"
        ) from error
    for kind, names in (("missing", sorted(found.missing_keys)), ("unexpected", sorted(found.unexpected_keys))):
        if names:
            raise ModelError(
                f"{folder.name}/{WEIGHTS_NAME}: {counted(len(names), f'{kind} tensor')}, first '{names[0]}': the "
                f"adapter was trained on a different base from the one in {_BASE_KEY} of {CONFIG_NAME}, or with an "
                f"older transformers, which named layers differently: {_MERGE}, with that version"
            )
    return merged


def _check_kind(config: Any, name: str) -> None:
    if config.is_prompt_learning:
        raise ModelError(f"{name}: an adapter of kind {config.peft_type.value} has no weights to merge: use LoRA")


def _base(folder: Path, config: Path, find: Callable[[str], Path]) -> Path:
    named = _read(config).get(_BASE_KEY)
    if not isinstance(named, str) or not named:
        raise ModelError(f"{config}: {_BASE_KEY} is {named!r}: set it to the base's folder or Hub id")
    beside = [path for path in (folder / named, folder.parent / named) if path.is_dir() and path != folder]
    try:
        base = find(named) if Path(named).is_dir() or not beside else beside[0]
    except ModelError as error:
        raise ModelError(f"{config}: {_BASE_KEY}: {error}") from error
    if not (base / "config.json").is_file():
        raise ModelError(f"{config}: {_BASE_KEY} is '{named}': no such checkpoint folder: set it to the base's folder")
    if adapter_files(base):
        raise ModelError(f"{config}: its base '{named}' is an adapter too: merge that one into its own base first")
    return base


def _read(config: Path) -> dict[str, Any]:
    try:
        content = json.loads(config.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{config}: not readable as JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{config}: expected a JSON object")
    return content


@functools.cache
def _scratch() -> Path:
    """A folder that is removed when the process ends."""
    made = tempfile.TemporaryDirectory(prefix="llavamod-adapters-")
    _KEPT.append(made)
    return Path(made.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []
