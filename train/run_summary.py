"""The summary of a finished run: `{output}/summary.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llavamod_offline.errors import ConfigError
from llavamod_offline.storage import atomic
from train.resume_check import check_settings

SUMMARY_NAME = "summary.json"


@dataclass(frozen=True)
class TrainSummary:
    """A run's outcome. `finished` is false if a SIGTERM stopped it; `metrics` are those of the last step.

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


def write_summary(output: Path, summary: TrainSummary, settings: dict[str, Any]) -> None:
    """Write the summary of a finished run, with the settings that made it."""
    content = asdict(summary) | {"settings": settings}
    atomic.write_file(output / SUMMARY_NAME, json.dumps(content, indent=2) + "\n")


def finished_summary(output: Path, settings: dict[str, Any]) -> TrainSummary | None:
    """Read the summary of a finished run; None if the run is not finished.

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
        raise ConfigError(f"output: {file} is not the summary of a run ({error!r}): choose another output") from error
    check_settings(output, before, settings)
    return summary
