"""Trackers in addition to `metrics.jsonl`: TensorBoard, trackio or Weights & Biases, imported only on request.

Not `accelerate.tracking`: it neither purges repeated steps, nor resumes a run under its id, nor survives an error.
"""

from __future__ import annotations

import logging
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Literal

from llavamod_offline.errors import ConfigError, first_line
from llavamod_offline.storage import atomic

TrackerName = Literal["none", "tensorboard", "trackio", "wandb"]
Track = Callable[[Mapping[str, Any]], None]

_PROJECT = "llavamod-offline"
_ID_NAME = "tracker_id"
_LOG = logging.getLogger(__name__)


@contextmanager
def tracker(name: TrackerName, output: Path, settings: Mapping[str, Any], *, resume_step: int) -> Iterator[Track]:
    """Yield a function that sends a log entry to the tracker, with the names of `metrics.jsonl`.

    `settings` are stored with the run, which is named after the `output` folder. A resumed run continues in the tracker
    (W&B's offline mode starts another segment of it); entries of repeated steps are dropped (TensorBoard), sent again
    (trackio) or kept (W&B). An error while sending or closing is logged once and ends tracking, not training. Trackers'
    own output goes to stderr.
    Errors: `ConfigError` if the tracker is not installed or does not start.
    """
    try:
        with redirect_stdout(sys.stderr):
            send, close = _OPEN[name](output, settings, resume_step)
    except ImportError as error:
        raise ConfigError(
            f"tracker: '{name}' is not installed ({error}): pip install {name}, or set it to none"
        ) from error
    except Exception as error:
        raise ConfigError(
            f"tracker: '{name}' does not start: {first_line(error)}: set it up, or set tracker=none"
        ) from error
    broken = False

    def track(entry: Mapping[str, Any]) -> None:
        nonlocal broken
        if broken:
            return
        try:
            with redirect_stdout(sys.stderr):
                send(int(entry["step"]), scalars(entry))
        except Exception as error:
            broken = True
            _LOG.warning("tracker %s: stopped: %s; metrics.jsonl continues", name, error)

    try:
        yield track
    finally:
        try:
            with redirect_stdout(sys.stderr):
                close()
        except Exception as error:
            _LOG.warning("tracker %s: not closed: %s; metrics.jsonl is complete", name, error)


def scalars(entry: Mapping[str, Any]) -> dict[str, float]:
    """Flatten the numbers of a log entry: `chosen_reward/p50`, `expert_load/0/3` (layer, expert)."""
    found: dict[str, float] = {}

    def flatten(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                flatten(f"{name}/{key}", item)
        elif isinstance(value, list):
            for place, item in enumerate(value):
                flatten(f"{name}/{place}", item)
        elif isinstance(value, int | float):
            found[name] = float(value)

    for name, value in entry.items():
        if name != "step":
            flatten(name, value)
    return found


_Opened = tuple[Callable[[int, dict[str, float]], None], Callable[[], None]]


def _nothing(output: Path, settings: Mapping[str, Any], resume_step: int) -> _Opened:
    return (lambda step, values: None), (lambda: None)


def _tensorboard(output: Path, settings: Mapping[str, Any], resume_step: int) -> _Opened:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(output / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)

    def send(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return send, writer.close


def _trackio(output: Path, settings: Mapping[str, Any], resume_step: int) -> _Opened:
    import trackio

    # trackio identifies a run by its name alone, and folders elsewhere may share this one's name.
    name = f"{output.resolve().name}-{_run_id(output, resume_step)}"
    trackio.init(project=_PROJECT, name=name, config=dict(settings), resume="allow")
    return (lambda step, values: trackio.log(values, step=step)), trackio.finish


def _wandb(output: Path, settings: Mapping[str, Any], resume_step: int) -> _Opened:
    import wandb

    run = wandb.init(
        project=_PROJECT,
        name=output.resolve().name,
        id=_run_id(output, resume_step),
        resume="allow",
        config=dict(settings),
        dir=str(output),
    )
    return (lambda step, values: run.log(values, step=step)), run.finish


def _run_id(output: Path, resume_step: int) -> str:
    """Return the run's id in the tracker, created on a fresh start and kept in the output folder for resuming."""
    file = output / _ID_NAME
    if not (resume_step and file.is_file()):
        atomic.write_file(file, uuid.uuid4().hex[:8])
    return file.read_text()


_OPEN: dict[str, Callable[[Path, Mapping[str, Any], int], _Opened]] = {
    "none": _nothing,
    "tensorboard": _tensorboard,
    "trackio": _trackio,
    "wandb": _wandb,
}
