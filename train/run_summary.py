"""What a finished run leaves for others to read: `{output}/summary.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llavamod_offline.errors import ConfigError
from llavamod_offline.storage import atomic
from train.config import TrainConfig
from train.resume_check import check_settings, settings_of

SUMMARY_NAME = "summary.json"


@dataclass(frozen=True)
class TrainSummary:
    """What a run came to. `finished` is false where a SIGTERM stopped it; `metrics` are the last step's.

    `tokens` counts all tokens of the sequences, `positions` the supervised ones, `seconds` those spent on steps;
    `samples` are those trained on, the other two those left out of the set.
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


def write_summary(output: Path, summary: TrainSummary, config: TrainConfig) -> None:
    """Write the summary of a finished run, with the settings that made it."""
    content = asdict(summary) | {"settings": settings_of(config)}
    atomic.write_file(output / SUMMARY_NAME, json.dumps(content, indent=2) + "\n")


def finished_summary(output: Path, config: TrainConfig) -> TrainSummary | None:
    """The summary of a run that is finished already, or nothing.

    Errors: `ConfigError` if it was made with other settings, or cannot be read.
    """
    file = output / SUMMARY_NAME
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_bytes())
        before = content.pop("settings")
        summary = TrainSummary(**content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"output: {file} is no run's summary ({error!r}): choose another output") from error
    check_settings(output, before, config)
    return summary
