"""What makes a run the same run: settings and contents that a resume must not change without notice.

Folders, logging, saving, ZeRO stage and number of processes may change; what decides the losses may not.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from llavamod_offline.errors import ConfigError
from train.config import TrainConfig

_FREE_KEYS = (
    "output",
    "data.set",
    "cache.path",
    "cache.allow",
    "student.checkpoint",
    "student.vision_tower",
    "student.language_model",
    "loss.align.teacher_head",
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
# The keys that decide a content, to be named when it differs.
_CONTENTS = {
    "set_digest": "data.set",
    "cache_digest": "cache.path",
    "kept_hash": "cache.path",
    "order": "data",
    "frozen_digest": "student",
}


def identity_of(
    config: TrainConfig,
    *,
    set_digest: str,
    cache_digest: str | None,
    kept_hash: str,
    order: dict[str, Any],
    frozen_digest: str,
) -> dict[str, Any]:
    """Put together what is stored with a checkpoint and compared when it is taken up again."""
    contents = {
        "set_digest": set_digest,
        "cache_digest": cache_digest,
        "kept_hash": kept_hash,
        "order": order,
        "frozen_digest": frozen_digest,
    }
    return {"settings": settings_of(config), **contents}


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """The settings that matter, flat, by their dotted keys."""
    flat: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(inner, f"{key}.{name}" if key else str(name))
        elif key not in _FREE_KEYS:
            flat[key] = list(value) if isinstance(value, tuple | list) else value

    walk(asdict(config), "")
    return flat


def check_settings(output: Path, before: dict[str, Any], config: TrainConfig) -> None:
    """Refuse to go on with other settings. Errors: `ConfigError` naming the key, its old and its new value."""
    now = settings_of(config)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"{key}: the run in {output} was started with {before.get(key)}, now it is {now.get(key)}: "
                "set it back, or choose another output"
            )


def check_contents(output: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with other data, records or frozen weights. Errors: `ConfigError` naming the key."""
    for name, key in _CONTENTS.items():
        if before.get(name) != now[name]:
            raise ConfigError(
                f"{key}: not the one that the run in {output} was started with ({name} differs): "
                "set it back, or choose another output"
            )
