"""Trackers beside `metrics.jsonl`: TensorBoard, trackio or Weights & Biases, imported only when asked for."""

from __future__ import annotations

import logging
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Literal

from llavamod_offline.errors import ConfigError
from llavamod_offline.storage import atomic

TrackerName = Literal["none", "tensorboard", "trackio", "wandb"]
Track = Callable[[Mapping[str, Any]], None]

_PROJECT = "llavamod-offline"
_ID_NAME = "tracker_id"
_LOG = logging.getLogger(__name__)


@contextmanager
def tracker(name: TrackerName, output: Path, settings: Mapping[str, Any], *, resume_step: int) -> Iterator[Track]:
    """Yield a function that sends a log entry to the tracker; its numbers are named as in `metrics.jsonl`.

    `settings` are shown beside the run, which is called as `output` is. A resumed run goes on in the tracker (but in
    W&B's offline mode, which begins another part of it); what was sent of later steps is dropped (TensorBoard), sent
    again (trackio) or kept (W&B). An error while sending is logged once and ends the tracking, not the training. What
    trackers print goes to stderr.
    Errors: `ConfigError` if the tracker is not installed, or refuses to start.
    """
    try:
        with redirect_stdout(sys.stderr):
            send, close = _OPEN[name](output, settings, resume_step)
    except ImportError as error:
        raise ConfigError(
            f"tracker: '{name}' is not installed ({error}): pip install {name}, or set it to none"
        ) from error
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"tracker: '{name}' does not start: {reason}: set it up, or set tracker=none") from error
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
            _LOG.warning("tracker %s: gave up: %s; metrics.jsonl goes on", name, error)

    try:
        yield track
    finally:
        with redirect_stdout(sys.stderr):
            close()


def scalars(entry: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a log entry under flat names: `chosen_reward/p50`, `expert_load/0/3` (layer, expert)."""
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

    # It knows a run again by its name alone: the folder's would also be that of a folder elsewhere.
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
    """What a tracker knows the run by: made when it begins, kept in its folder for when it goes on."""
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
