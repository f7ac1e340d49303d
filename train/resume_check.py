"""What a rerun must share with the run that it continues or finds finished: everything that determines the losses.

Folders, logging, saving, ZeRO stage, attention and the number of processes may change. What an error message suggests
as a remedy (`is_remedy`, a repaired set) may change when a run is resumed, with a line in the log, but not once it is
finished.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavamod_offline.errors import ConfigError

_CHOOSING = ("data.too_long", "cache.missing", "max_length")  # these choose the samples
_REMEDIES = (*_CHOOSING, "optim.lr", "optim.projector_lr", "optim.part_lr", "optim.grad_clip")
_FREE_KEYS = (
    "output",
    "data.set",
    "cache.path",
    "cache.allow",
    "student.checkpoint",
    "student.vision_tower",
    "student.language_model",
    "student.projector",
    "loss.align.teacher_lm_head",
    "batch.micro_size",
    "engine.zero_stage",
    "engine.offload",
    "engine.attention",
    "engine.gradient_checkpointing",
    "save_steps",
    "keep_last",
    "log_steps",
    "eval_steps",
    "tracker",
    "workers",
)
# For each of these contents, the config key to name if it differs, and what to call it.
_CONTENTS = {
    "set_digest": ("data.set", "a set of digest"),
    "cache_digest": ("cache.path", "a cache of digest"),
    "start_digest": ("student", "a checkpoint of digest"),
    "kept_hash": ("cache.path", "samples of digest"),
    "order": ("data", "the order"),
    "frozen_digest": ("student", "frozen weights of digest"),
}
_SHOWN = 16


@dataclass(frozen=True)
class Difference:
    """A setting, or the content behind it (`name`), that has changed."""

    key: str
    was: Any
    now: Any
    name: str = ""

    def __str__(self) -> str:
        return f"{self.key}: {self.was} → {self.now}"


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a nested configuration to dotted keys, without those that a rerun may change."""
    flat: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if key in _FREE_KEYS:
            return
        if isinstance(value, Mapping):
            for name, inner in value.items():
                walk(inner, f"{key}.{name}" if key else str(name))
        else:
            flat[key] = list(value) if isinstance(value, tuple | list) else value

    walk(config, "")
    return flat


def is_remedy(key: str) -> bool:
    """Whether a setting may change when a run is resumed, to remedy what stopped it."""
    return any(key == remedy or key.startswith(f"{remedy}.") for remedy in _REMEDIES)


def may_change(key: str) -> bool:
    """Whether a setting may change when a run is resumed, as a remedy or because it does not change what is learned."""
    return is_remedy(key) or key in _FREE_KEYS


def different_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """List the flat settings that differ, by key; one that the earlier run's version lacked counts as off."""
    keys = sorted(key for key in before.keys() | now.keys() if key in before or now[key])
    return [Difference(key, before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)]


def different_contents(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """List the digests of data, records and weights that differ; those that one side lacks are not compared."""
    return [
        Difference(key, _described(what, before[name]), _described(what, now[name]), name)
        for name, (key, what) in _CONTENTS.items()
        if name in before and name in now and before[name] != now[name]
    ]


def accepted_contents(
    output: Path,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    changed: Sequence[Difference],
    is_repaired: Callable[[], bool],
) -> list[Difference]:
    """Compare the contents of a run resumed with `changed` settings; return the allowed differences of set and cache.

    A repaired set (`is_repaired`) may replace the original one, with a cache made with the same settings.
    Errors: `ConfigError` naming every other difference.
    """
    found = different_contents(before, now)
    allowed = {"kept_hash"} if any(one.key in _CHOOSING for one in changed) else set()
    if any(one.name == "set_digest" for one in found) and is_repaired():
        allowed |= {"set_digest", "kept_hash"}
        if before.get("cache_settings") == now["cache_settings"]:
            allowed.add("cache_digest")
        if before["order"] | {"window": 0} == now["order"] | {"window": 0}:  # it depends on the number of shards
            allowed.add("order")
    refuse(output, [one for one in found if one.name not in allowed])
    return [one for one in found if one.name in ("set_digest", "cache_digest")]


def refuse(output: Path, found: Sequence[Difference], *, finished: bool = False) -> None:
    """Refuse a rerun that differs. Errors: `ConfigError` naming each difference."""
    if not found:
        return
    run = f"the finished run in {output} was made" if finished else f"the run in {output} was started"
    first, *others = found
    more = "".join(f"; {other.key}: with {other.was}, not {other.now}" for other in others)
    them = "them" if others else "it"
    raise ConfigError(
        f"{first.key}: {run} with {first.was}, not {first.now}{more}: set {them} back, or choose another output"
    )


def _described(what: str, value: Any) -> str:
    if value is None:
        return "none"
    return f"{what} {value[:_SHOWN]}…" if isinstance(value, str) else f"{what} {value}"
