"""Quantised checkpoints: what transformers needs to load them, as one line if it is missing."""

from __future__ import annotations

import json
from pathlib import Path

from llavamod_offline.errors import ConfigError, LlavaModError, first_line


def quantisation(folder: Path) -> str | None:
    """The method by which a checkpoint's weights are quantised, as config.json names it; None if they are not."""
    try:
        config = json.loads((folder / "config.json").read_text())
        found = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    except (OSError, ValueError, AttributeError):  # another check names the file
        return None
    return str(found.get("quant_method", "unknown")) if isinstance(found, dict) else None


def cannot_load(folder: Path, method: str, error: Exception) -> LlavaModError:
    """The error of a quantised checkpoint that transformers refuses; its reason names the missing package or device."""
    return ConfigError(
        f"{folder}: its weights are quantised ({method}), which cannot be loaded here: {first_line(error)}: install "
        "what is missing, or use a checkpoint in full precision"
    )
