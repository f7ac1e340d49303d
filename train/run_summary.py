"""The summary of a finished run: `{output}/summary.json`."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llavamod_offline.data.encode.template import AUTO
from llavamod_offline.errors import ConfigError, LlavaModError
from llavamod_offline.storage import atomic
from train.checkpoint import latest_checkpoint, read_progress
from train.config import TrainConfig
from train.resume_check import different_contents, different_settings, refuse

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.yaml"  # the settings of the run
SUMMARY_NAME = "summary.json"


@dataclass(frozen=True)
class TrainSummary:
    """A run's outcome. `finished` is false if a signal stopped it; `metrics` are those of the last step.

    `tokens` counts all tokens of the sequences, `positions` the supervised ones, `seconds` the time spent on steps;
    `samples` counts those trained on, `samples_without_record` and `samples_too_long` those left out.
    """

    stage: str
    output: str
    student: str
    finished: bool
    steps: int
    seconds: float
    tokens: int
    positions: int
    samples: int
    samples_without_record: int
    samples_too_long: int
    parameters: int
    activated_parameters: int
    trained_parameters: int
    cache_digest: str | None
    metrics: dict[str, Any]


def write_summary(
    output: Path,
    summary: TrainSummary,
    settings: Mapping[str, Any],
    contents: Mapping[str, Any],
    changes: Sequence[str],
) -> None:
    """Write the summary of a finished run, with the settings and the digests of the contents that made it.

    `changes`: what changed when it was resumed, and after which step.

    Errors: `ConfigError` if the disk is full.
    """
    content = asdict(summary) | {"settings": settings, "contents": contents, "changes": list(changes)}
    file = output / SUMMARY_NAME
    try:
        atomic.write_file(file, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(
            f"output: cannot write {file} ({error.strerror}): free disk space, then rerun the command, which "
            "only exports"
        ) from error


def finished_summary(
    output: Path, settings: Mapping[str, Any], contents: Callable[[], Mapping[str, Any]]
) -> TrainSummary | None:
    """Read the summary of a finished run; None if the run is not finished, or its student was removed.

    `contents` returns the digests of the data and checkpoints that the configuration names now.
    Errors: `ConfigError` if the run had other contents or settings, or its summary cannot be compared or read.
    """
    file = output / SUMMARY_NAME
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_bytes())
        before, made_from = content.pop("settings"), content.pop("contents", {})
        content.pop("changes", None)
        student = output / Path(content["student"]).name
        # The folder may have been renamed since.
        summary = TrainSummary(**content | {"output": str(output), "student": str(student)})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"output: {file} is not the summary of a run ({error!r}): choose another output") from error
    found = different_settings(before, settings)
    try:
        found += different_contents({"cache_digest": summary.cache_digest, **made_from}, contents())
    except LlavaModError as error:
        raise ConfigError(
            f"output: {output} holds a finished run that cannot be compared with this one: {error}"
        ) from error
    refuse(output, found, finished=True)
    if not student.is_dir():
        logger.warning("%s: the run is finished, but %s was removed: making it again", output, student)
        return None
    return summary


def as_begun(config: TrainConfig) -> TrainConfig:
    """Replace an `auto` template or image aspect with that of the run in the output folder, if there is one."""
    output = Path(config.output)
    undecided = [name for name in ("template", "image_aspect") if getattr(config, name) == AUTO]
    checkpoint = latest_checkpoint(output) if undecided else None
    before: Any = {}
    with contextlib.suppress(OSError, ValueError):  # damage is reported when the file is opened
        if checkpoint is not None:
            before = read_progress(checkpoint)[1]
        elif undecided and (output / SUMMARY_NAME).is_file():
            before = json.loads((output / SUMMARY_NAME).read_bytes())
    settings = before.get("settings", {}) if isinstance(before, dict) else {}
    return replace(config, **{name: settings.get(name, AUTO) for name in undecided})
