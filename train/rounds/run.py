"""`llavamod-offline rounds`: run the commands that are not done yet, then report."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llavamod_offline.config import dump_config, load_config
from llavamod_offline.config.render import as_yaml
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.demo.commands import as_script
from llavamod_offline.demo.scheduler import run_steps
from llavamod_offline.errors import ConfigError
from llavamod_offline.models.checkpoint import check_folder
from llavamod_offline.models.hub import checkpoint_folder
from llavamod_offline.progress import ProgressBar
from llavamod_offline.signals import keeping
from llavamod_offline.storage.atomic import write_file
from llavamod_offline.storage.lock import locked
from train.resume_check import may_change
from train.rounds.config import RoundsConfig
from train.rounds.measure import measure_own_answers, scores
from train.rounds.plan import SCRIPT_HEAD, check_settings, round_folder, round_steps
from train.rounds.report import write_report
from train.student.source import is_sparse_checkpoint

CONFIG_NAME, COMMANDS_NAME, RESULT_NAME = "rounds.yaml", "commands.sh", "rounds.json"
_FREE = ("rounds", "output", "batch_size", "trainer", "benchmarks", "tasks")  # they change no student
_BEFORE_TRAINING = ("stage", "steps", "train")  # may change until round 1 has trained
_LOG = logging.getLogger(__name__)


def run_rounds(config: RoundsConfig) -> dict[str, Any]:
    """Run all rounds and report them; each command resumes where an earlier call left it.

    Returns the content of `rounds.json`. Errors: `ConfigError` if `output` was begun with other settings; those of a
    missing checkpoint or set, before anything is written; `StepError` if a command fails.
    """
    check_settings(config)
    for checkpoint in (config.teacher, config.student):
        check_folder(checkpoint_folder(checkpoint))
    if is_sparse_checkpoint(checkpoint_folder(config.student)) != (config.stage == "mimic_sparse"):
        right = "mimic_dense" if config.stage == "mimic_sparse" else "mimic_sparse"
        raise ConfigError(
            f"stage is {config.stage}, which does not fit the student '{config.student}': set it to {right}"
        )
    for samples in (config.prompts, config.holdout):
        SampleSet.open(samples)
    output, steps = Path(config.output), round_steps(config)
    with locked(output), keeping(lambda: _kept(config)):
        _begin(output, config)
        write_file(output / COMMANDS_NAME, as_script(steps, SCRIPT_HEAD))
        done = {f"train-{number}": 0.0 for number in range(1, config.rounds + 1) if _has_trained(output, number)}
        with ProgressBar("rounds", len(steps), "command", done=len(done)) as bar:
            run_steps(
                steps,
                Path(),
                at_once=1,
                logs=output / "logs",
                on_start=lambda step: bar.write(step.typed),
                on_end=lambda step, seconds: bar.advance(),
                done=done,  # with settings that may have been remedied since
            )
        return _report(config)


def _begin(output: Path, config: RoundsConfig) -> None:
    """Record the settings, which a rerun must share, except for some.

    These are those in `_FREE`, `_BEFORE_TRAINING`, and what resumed training may change.

    Errors: `ConfigError`.
    """
    file = output / CONFIG_NAME
    if file.is_file():
        before = asdict(load_config(RoundsConfig, (file,)))
        run = round_folder(output, 1) / "run"
        begun_training = any(run.glob("checkpoints/*")) or any(run.glob("summary.json"))
        for name, now in asdict(config).items():
            was = before[name]
            free = (*_FREE, *(() if begun_training else _BEFORE_TRAINING))
            if was != now and name not in free and not (name == "train" and _resumable(was, now)):
                raise ConfigError(
                    f"{file}: the rounds were begun with '{name}: {as_yaml(was)}', not '{name}: {as_yaml(now)}': set "
                    "it back, or choose another output"
                )
    write_file(file, dump_config(config))


def _has_trained(output: Path, number: int) -> bool:
    run = round_folder(output, number) / "run"
    return (run / "summary.json").is_file() and (run / "student").is_dir()


def _resumable(was: Sequence[str], now: Sequence[str]) -> bool:
    """Whether two lists of `train-student` settings differ only in what a resumed run may change."""
    sides = [dict(setting.partition("=")[::2] for setting in side) for side in (was, now)]
    return all(may_change(key) for key in sides[0].keys() | sides[1].keys() if sides[0].get(key) != sides[1].get(key))


def _kept(config: RoundsConfig) -> str:
    done = [
        n for n in range(1, config.rounds + 1) if (round_folder(config.output, n) / "run" / "summary.json").exists()
    ]
    return f"{len(done)} of {config.rounds} rounds are done in {config.output}, and what the next has begun is kept"


def _report(config: RoundsConfig) -> dict[str, Any]:
    rows = []
    for number in range(config.rounds + 1):
        folder = round_folder(config.output, number)
        own = measure_own_answers(folder / "holdout" / "set", folder / "holdout" / "cache")
        rows.append({"round": number, **asdict(own), **scores(folder / "eval", config.tasks)})
    result = {"loss": config.loss, "steps_per_round": config.steps, "rounds": rows}
    write_file(Path(config.output) / RESULT_NAME, json.dumps(result, indent=1) + "\n")
    write_report(config, rows)
    return result
