"""SIGTERM with a grace period: the current shard is finished if there is time, else released; the status says which."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from llavamod_offline.config import load_config
from llavamod_offline.errors import ConfigError
from llavamod_offline.signals import FINISHED_STATUS, Stopped, interruptible
from teacher_cache.capture.run import run_capture
from teacher_cache.capture_setup import CaptureSetup
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.engines.protocol import CaptureEngine, Outcome, Request
from teacher_cache.format.record import RecordSettings
from teacher_cache.generate.answer_rows import Answerer
from teacher_cache.generate.generated_set import AnsweredSample
from teacher_cache.generate.run import generate
from teacher_cache.read.reader import open_cache
from teacher_cache.work.claims import histories
from teacher_cache.work.run import work
from teacher_cache.write.store import CacheStore
from tests.teacher_cache.conftest import World
from tests.teacher_cache.generate.reference import Place


class Stopping:
    """A teacher that gets SIGTERM in the middle of the second shard that it captures."""

    settings: RecordSettings

    def load(self, setup: CaptureSetup) -> CaptureEngine:
        """Load the real teacher that this one wraps."""
        self._engine, self._shards = setup.load(), 0
        self.settings = self._engine.settings
        return copy.copy(self)

    def capture(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        """Capture a shard."""
        self._shards += 1
        for number, outcome in enumerate(self._engine.capture(requests)):
            yield outcome
            if (self._shards, number) == (2, 1):
                os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("command", ["run", "work"])
@pytest.mark.parametrize(("grace", "shards"), [(600.0, 2), (1e-6, 1), (0.0, 1)])
def test_the_shard_in_hand_is_finished_or_released(
    command: str, grace: float, shards: int, world: World, finished: Path, tmp_path: Path
) -> None:
    config = load_config(CacheTeacherConfig, (), world.arguments(tmp_path / "c"))
    capture: Callable[..., object] = run_capture if command == "run" else work
    with interruptible(), pytest.raises(Stopped) as stopped:
        capture(config, load=Stopping().load, grace_seconds=grace)
    stop = stopped.value
    assert stop.kept == f"{shards} of 5 shards are in {tmp_path / 'c'}"
    assert bool(stop.finished) == (shards == 2)
    assert stop.status == (FINISHED_STATUS if shards == 2 else 143)
    store = CacheStore.open(tmp_path / "c", open_cache(finished).fingerprint, open_cache(finished).shard_names)
    assert len(store.missing()) == 5 - shards
    left = histories(store.folder)
    assert not any(history.is_held for history in left.values())  # other workers may take them at once
    done = work(config, lease_seconds=1.0).capture if command == "work" else run_capture(config)
    assert done.digest == open_cache(finished).digest


def test_answers_to_a_shard_are_finished(place: Place, greedy: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, calls = Answerer.answer, []

    def stopped_once(self: Answerer, rows: Sequence[int]) -> list[AnsweredSample]:
        found = answer(self, rows)
        calls.append(rows)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(Answerer, "answer", stopped_once)
    with interruptible(), pytest.raises(Stopped) as stopped:
        generate(load_config(CacheTeacherConfig, (), place.arguments()), grace_seconds=600.0)
    assert stopped.value.finished.startswith("shard '")
    again = place.generate()
    assert again.capture is not None
    assert again.capture.digest == open_cache(greedy.cache()).digest
    assert len(calls) == len({tuple(rows) for rows in calls})  # no shard was answered twice


def test_ray_has_no_grace(world: World, tmp_path: Path) -> None:
    config = load_config(CacheTeacherConfig, (), world.arguments(tmp_path / "c", "engine.ray=true"))
    with pytest.raises(ConfigError, match="--grace: Ray's workers finish no shards when a run is stopped"):
        run_capture(config, grace_seconds=1.0)
