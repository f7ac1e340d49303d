"""Trackers: what reaches a real TensorBoard log, and that no tracker is imported unless asked for."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from llavamod_offline.config import dump_config
from llavamod_offline.errors import ConfigError
from tests.train.conftest import World
from tests.train.reference import read_metrics
from train.run import train
from train.tracking import _OPEN, _run_id, scalars, tracker

ENTRY = {"step": 3, "loss": 0.5, "expert_load": [[0.75, 0.25]], "chosen_reward": {"p50": -1.0}, "note": "text"}


def test_numbers_get_flat_names() -> None:
    assert scalars(ENTRY) == {"loss": 0.5, "expert_load/0/0": 0.75, "expert_load/0/1": 0.25, "chosen_reward/p50": -1.0}


def test_a_run_is_in_tensorboard_as_in_its_log(world: World, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(world.config("mimic_sparse", tmp_path / "run", "tracker=tensorboard"))
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    log = read_metrics(tmp_path / "run")
    for name in ("loss", "kl", "lr", "expert_load/0/3"):
        assert [event.step for event in events.Scalars(name)] == [1, 2, 3, 4]
        assert [event.value for event in events.Scalars(name)] == pytest.approx([scalars(e)[name] for e in log])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_that_goes_on_is_one_run_there_and_stdout_stays_clean(world: World, tmp_path: Path, name: str) -> None:
    """With the real packages, offline, in processes of their own; the run is stopped in between."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    config = world.config("mimic_sparse", tmp_path / "run", f"tracker={name}", "workers=1")
    (tmp_path / "run.yaml").write_text(dump_config(config))
    environment = os.environ | {
        "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "TRACKIO_DIR": str(tmp_path / "trackio"),
        "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", _STOP_AFTER_TWO, str(tmp_path / "run.yaml")]
    subprocess.run(command, env=environment, capture_output=True, check=True)
    script = str(Path(sys.executable).with_name("train-student"))
    command = [script, str(tmp_path / "run.yaml"), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["finished"]
    found = _read_wandb(tmp_path / "run") if name == "wandb" else _read_trackio(tmp_path / "trackio")
    assert {run for run, _, _ in found} == {f"run-{(tmp_path / 'run' / 'tracker_id').read_text()}"}
    assert {step for _, step, _ in found} == {1, 2, 3, 4}
    log = {entry["step"]: scalars(entry) for entry in read_metrics(tmp_path / "run")}
    for _, step, values in found:
        for metric in ("loss", "kl", "lr", "expert_load/0/3"):
            assert values[metric] == pytest.approx(log[step][metric])


_STOP_AFTER_TWO = """
import os, signal, sys
from train.config.recipes import resolve_config
from train.metrics import MetricsLog
from train.run import train
write = MetricsLog.write
def write_and_stop(log, entry):
    write(log, entry)
    if entry["step"] == 2:
        os.kill(os.getpid(), signal.SIGTERM)
MetricsLog.write = write_and_stop
assert not train(resolve_config([sys.argv[1]])).finished
"""


def _read_trackio(folder: Path) -> list[tuple[str, int, dict[str, float]]]:
    (file,) = folder.glob("*.db")
    with closing(sqlite3.connect(file)) as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    return [(str(run), int(step), json.loads(metrics)) for run, step, metrics in rows]


def _read_wandb(output: Path) -> list[tuple[str, int, dict[str, float]]]:
    from wandb.proto import wandb_internal_pb2

    found = []
    for file in (output / "wandb").glob("offline-run-*/*.wandb"):
        name = ""
        for content in _leveldb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "run":
                name = f"{record.run.display_name}-{record.run.run_id}"
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                values = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
                found.append((name, int(values["_step"]), values))
    return found


def _leveldb_records(content: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log after W&B's seven bytes: checksum, length, kind, then the data, in 32 KB blocks."""
    place, parts = 7, b""
    while place + 7 <= len(content):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_what_is_not_installed_is_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with (
        pytest.raises(ConfigError, match=rf"tracker: '{name}' is not installed .*pip install {name}"),
        tracker(name, tmp_path, {}, resume_step=0),  # type: ignore[arg-type]
    ):
        pass


def test_a_new_run_in_an_old_folder_is_another_run(tmp_path: Path) -> None:
    first = _run_id(tmp_path, 0)
    assert _run_id(tmp_path, 3) == first
    assert _run_id(tmp_path, 0) != first


def test_a_tracker_that_breaks_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensorboard")
    with caplog.at_level(logging.WARNING), tracker("tensorboard", tmp_path, {}, resume_step=0) as track:
        track(ENTRY)
        track({"loss": 0.1})  # no step: stands for any failure of the tracker, such as a lost connection
        track(ENTRY)
    assert len([record for record in caplog.records if "stopped: " in record.message]) == 1


def test_a_tracker_that_does_not_close_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its service has died: the run is over, and its summary must follow."""

    def close() -> None:
        raise ConnectionError("service is gone")

    monkeypatch.setitem(_OPEN, "wandb", lambda *_: (lambda step, numbers: None, close))
    with tracker("wandb", tmp_path, {}, resume_step=0) as track:
        track(ENTRY)
    assert "tracker wandb: not closed: service is gone; metrics.jsonl is complete" in caplog.text


def test_none_imports_no_tracker() -> None:
    code = "import sys, train.run; print([n for n in ('tensorboard', 'wandb', 'trackio') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
