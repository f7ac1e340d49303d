"""Checkpoints by path or by Hugging Face Hub id; the latter only as local snapshots: nothing is downloaded.

`huggingface_hub` finds the snapshot, so HF_HOME and HF_HUB_CACHE mean what they mean to every other tool.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from llavamod_offline.errors import ModelError, first_line
from llavamod_offline.models.loading.adapter import CONFIG_NAME as ADAPTER_CONFIG
from llavamod_offline.models.loading.adapter import is_adapter, with_base

_HUB_ID = re.compile(r"(?P<id>[\w.\-]+/[\w.\-]+)(?:@(?P<revision>[\w.\-/]+))?")
_INDEX_NAME = "model.safetensors.index.json"
_WEIGHTS = "*.safetensors"
_READ = ("*.json", "*.jinja")  # what is needed of a snapshot besides weights


def checkpoint_folder(name: str | Path, *, weights: bool = True) -> Path:
    """The folder of a checkpoint: a path, or the local snapshot of a Hub id `org/name` or `org/name@revision`.

    A folder of that name takes precedence. A name that is not such an id is returned as a path. A PEFT adapter is
    opened with its base. Without `weights` a snapshot may lack them.
    Errors: `ModelError` naming the command that downloads a snapshot which is missing or incomplete.
    """
    folder = _named_folder(name, weights)
    return with_base(folder.absolute(), checkpoint_folder) if is_adapter(folder) else folder


def _named_folder(name: str | Path, weights: bool) -> Path:
    found = _HUB_ID.fullmatch(str(name))
    if found is None or os.path.exists(name) or str(name).startswith("."):
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, revision = found["id"], found["revision"]
    command = f"`hf download {repository}{f' --revision {revision}' if revision else ''}`"
    try:
        needed = [*_READ, *([_WEIGHTS] if weights else [])]
        folder = snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=needed)
    except LocalEntryNotFoundError as error:
        incomplete = "ncomplete" in type(error).__name__
        what = "its local snapshot is incomplete" if incomplete else "no such folder, nor a local snapshot of a Hub id"
        raise ModelError(f"{name}: {what}: run {command}, or name a checkpoint folder") from error
    except (ValueError, OSError) as error:  # an invalid id, or an unreadable cache
        raise ModelError(f"{name}: no such folder, nor a Hub id: {first_line(error)}: correct it") from error
    missing = [file for file in _missing_files(Path(folder)) if weights or not file.endswith(".safetensors")]
    if missing:
        raise ModelError(f"{name}: its local snapshot lacks {missing[0]}: run {command} again")
    return Path(folder)


def checkpoint_name(folder: Path) -> str:
    """What a checkpoint is called in results: its folder's name, or the Hub id of a snapshot."""
    folder = folder.resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return folder.name


def weight_files(folder: Path) -> list[Path]:
    """A checkpoint's safetensors files, by name. Errors: `ModelError` if there are none, or one is missing."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = next((file.name for kind in ("*.bin", "*.pt", "*.pth") for file in sorted(folder.glob(kind))), None)
        if pickled is not None:
            raise ModelError(
                f"{folder}: its weights are pickled ({pickled}), which may run code, so they are never read: use a "
                "revision with *.safetensors files, or load it with transformers where you trust it and call "
                "save_pretrained"
            )
        raise ModelError(f"{folder}: no *.safetensors file: save the checkpoint with save_pretrained first")
    missing = _missing_files(folder)
    if missing:
        raise ModelError(f"{folder}: {missing[0]} is missing: copy the checkpoint again")
    return files


def _missing_files(folder: Path) -> list[str]:
    """The files that a checkpoint needs and lacks: its configuration, shards, and targets of broken links."""
    described = ADAPTER_CONFIG if is_adapter(folder) else "config.json"
    names = {described, *(file.name for file in folder.glob("*.safetensors"))}
    try:
        index: Any = json.loads((folder / _INDEX_NAME).read_bytes())
        names |= set(index["weight_map"].values())
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [_INDEX_NAME]
    return sorted(name for name in names if not (folder / name).is_file())
