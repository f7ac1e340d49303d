"""What a resumed run must share with the one it continues: settings and contents that decide the losses.

Folders, logging, saving, ZeRO stage and the number of processes may change.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavamod_offline.errors import ConfigError

_FREE_KEYS = (
    "output",
    "data.set",
    "cache.path",
    "cache.allow",
    "student.checkpoint",
    "student.vision_tower",
    "student.language_model",
    "loss.align.teacher_lm_head",
    "batch.micro_size",
    "engine.zero_stage",
    "engine.offload",
    "engine.gradient_checkpointing",
    "save_steps",
    "keep_last",
    "log_steps",
    "eval_steps",
    "tracker",
    "workers",
)
# The config key to name when one of these contents differs.
_CONTENTS = {
    "set_digest": "data.set",
    "cache_digest": "cache.path",
    "kept_hash": "cache.path",
    "order": "data",
    "frozen_digest": "student",
}


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a nested configuration to dotted keys, without those that a resumed run may change."""
    flat: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                walk(inner, f"{key}.{name}" if key else str(name))
        elif key not in _FREE_KEYS:
            flat[key] = list(value) if isinstance(value, tuple | list) else value

    walk(config, "")
    return flat


def check_settings(output: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare flat settings. Errors: `ConfigError` naming the first key that differs, its old and its new value."""
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"{key}: the run in {output} was started with {before.get(key)}, not {now.get(key)}: "
                "set it back, or choose another output"
            )


def check_contents(output: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare digests of data, records and frozen weights. Errors: `ConfigError` naming the key."""
    for name, key in _CONTENTS.items():
        if before.get(name) != now[name]:
            raise ConfigError(
                f"{key}: the run in {output} was started with other contents ({name} differs): "
                "set it back, or choose another output"
            )
