"""Rounds as a whole: ordinary sets, caches and runs, resumable at any moment, with correct figures."""

from __future__ import annotations

import dataclasses
import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llavamod_offline.config import load_config
from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Generated
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import ConfigError, DataError, ModelError
from teacher_cache.read.reader import open_cache
from tests.processes import start
from tests.tiny import tiny_samples
from tests.train.conftest import World, write_cache
from tests.train.reference import Reader
from tests.train.rounds.world import Prompts, write_world
from train.rounds.config import RoundsConfig
from train.rounds.measure import measure_own_answers
from train.rounds.run import CONFIG_NAME, _begin, run_rounds


def test_the_measure_is_that_of_a_loop_over_dense_distributions(world: World, tmp_path: Path) -> None:
    """With single-turn answers, and with some that are tokenised differently from how they were written."""
    reader, teacher = Reader(world.student, world.chats), Reader(world.teacher, world.chats)
    made, kl, lengths = [], [], []
    rng = np.random.default_rng(1)
    for number, sample in enumerate(tiny_samples(12)):
        last = dataclasses.replace(sample, turns=sample.turns[-2:]) if "<image>" in sample.turns[-2].text else sample
        count = len(reader.encoder.encode(last, "response").supervised_N)
        own = tuple((-rng.exponential(1.0, max(1, count // 2))).round(3).tolist())
        kept = None if number % 4 == 3 else own
        generated = Generated("w", "s", sample.key, "last", 1.0, 1.0, 99, 0, None, (kept,))
        made.append(dataclasses.replace(last, generated=generated))
        if kept is not None:
            found_N = teacher.answer(made[-1]).target_log_probs_N.detach().numpy()[-len(own) :]
            kl.append(float(np.sum(own) - found_N.sum()))
            lengths.append(len(own))
    data = write_set(made, tmp_path / "own", generated={"teacher": {}, "generate": {"temperature": 1.0}}).path
    cache = write_cache(tmp_path / "cache", data, world.teacher, "capture.preset=reference", "capture.precision=exact")
    found = measure_own_answers(data, cache)
    assert found.reverse_kl == pytest.approx(sum(kl) / sum(lengths), abs=1e-4)
    assert (found.answers, found.reread, found.rejected) == (9, 3, 0)
    assert found.length == pytest.approx(np.mean(lengths))
    assert 0 < found.standard_error < abs(found.reverse_kl) + 1
    none = [
        dataclasses.replace(sample, generated=dataclasses.replace(sample.generated, behaviour_log_probs=(None,)))
        for sample in made
        if sample.generated
    ]
    write_set(none, tmp_path / "none", generated={"teacher": {}, "generate": {"temperature": 1.0}})
    with pytest.raises(DataError, match="no answer can be measured"):
        measure_own_answers(tmp_path / "none", cache)


def test_other_settings_in_the_same_folder_are_refused_but_more_rounds_are_not(tmp_path: Path) -> None:
    places = ["prompts=a", "holdout=b", "teacher=t", "student=s", f"output={tmp_path}"]

    def begin(*settings: str) -> None:
        _begin(tmp_path, load_config(RoundsConfig, (), [*places, *settings]))

    begin()
    begin("rounds=3")
    begin("output=elsewhere")
    file = tmp_path / CONFIG_NAME
    file.write_text(
        "".join(f"# of another version\n{line}\n" for line in file.read_text().splitlines() if "#" not in line)
    )
    begin()
    with pytest.raises(ConfigError, match=r"begun with 'loss: reverse_kl', not 'loss: forward_kl': set it back"):
        begin("loss=forward_kl")
    begin("train=[batch.global_size=96]", "stage=mimic_sparse")  # what has not trained yet may train otherwise
    begin()
    (tmp_path / "round-1" / "run" / "checkpoints" / "1").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"begun with 'train: \[\]', not 'train: \[optim.weight_decay=1\]'"):
        begin("train=[optim.weight_decay=1]")


def test_what_stopped_rounds_can_be_remedied(tmp_path: Path) -> None:
    """Out of memory, a loss that is NaN, a benchmark that does not exist."""
    places = ["prompts=a", "holdout=b", "teacher=t", "student=s", f"output={tmp_path}"]
    for settings in (
        ["benchmarks=c", "tasks=[popo]"],
        ["benchmarks=d", "tasks=[pope]", "batch_size=4", "train=[batch.micro_size=1,optim.lr=1e-6]"],
        ["trainer=python -m train", "train=[optim.lr=1e-7]"],
    ):
        _begin(tmp_path, load_config(RoundsConfig, (), [*places, *settings]))


def test_rounds_that_have_trained_are_not_trained_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their run is finished with the settings of then: a remedy for round 2 would be refused there."""
    holdout = write_set(tiny_samples(4), tmp_path / "holdout").path
    settings = [f"prompts={world.chats}", f"holdout={holdout}", f"teacher={world.teacher}", f"student={world.student}"]
    run = tmp_path / "rounds" / "round-1" / "run"
    (run / "student").mkdir(parents=True)
    (run / "summary.json").write_text("{}")
    seen: list[dict[str, float]] = []
    monkeypatch.setattr("train.rounds.run.run_steps", lambda *_, done, **__: seen.append(done))
    monkeypatch.setattr("train.rounds.run._report", lambda config: {})
    run_rounds(load_config(RoundsConfig, (), [*settings, f"output={tmp_path / 'rounds'}", "train=[optim.lr=1e-6]"]))
    assert seen == [{"train-1": 0.0}]


def test_a_stage_that_does_not_fit_the_student_is_refused_first(world: World, tmp_path: Path) -> None:
    settings = [f"prompts={world.chats}", f"holdout={tmp_path}", f"teacher={world.teacher}", f"student={world.student}"]
    config = load_config(RoundsConfig, (), [*settings, "stage=mimic_sparse", f"output={tmp_path / 'rounds'}"])
    with pytest.raises(ConfigError, match=r"stage is mimic_sparse, which does not fit .*: set it to mimic_dense"):
        run_rounds(config)
    assert not (tmp_path / "rounds").exists()


def test_a_missing_teacher_is_named_before_anything_is_written(world: World, tmp_path: Path) -> None:
    settings = (f"prompts={world.chats}", f"holdout={tmp_path}", f"student={world.student}", "teacher=none")
    config = load_config(RoundsConfig, (), [*settings, f"output={tmp_path / 'rounds'}"])
    with pytest.raises(ModelError, match="none: no such checkpoint folder"):
        run_rounds(config)
    assert not (tmp_path / "rounds").exists()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    return write_world(tmp_path_factory.mktemp("prompts"))


def digests(output: Path, rounds: int) -> dict[str, Any]:
    """What identifies each round's set, cache and student, by its name."""
    found: dict[str, Any] = {}
    for number in range(1, rounds + 1):
        folder = output / f"round-{number}"
        found[f"set {number}"] = SampleSet.open(folder / "set").digest
        found[f"cache {number}"] = open_cache(folder / "cache").digest
        found[f"student {number}"] = (folder / "run" / "student" / "model.safetensors").read_bytes()
    return found


@pytest.mark.slow
def test_rounds_that_are_stopped_are_those_of_one_go(prompts: Prompts, tmp_path: Path) -> None:
    """The toy teacher learns from itself: its KL stays about 0."""

    def run(output: Path, *, seconds: float | None = None) -> int:
        process = start(["llavamod-offline", "rounds", *prompts.arguments(output), "--json"])
        if seconds is not None:
            time.sleep(seconds)
            process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate()
        assert "Traceback" not in stderr, stderr
        assert process.returncode in (0, 143), stderr
        return int(process.returncode)

    began = time.monotonic()
    assert run(tmp_path / "whole") == 0
    taken = time.monotonic() - began
    result = json.loads((tmp_path / "whole" / "rounds.json").read_text())
    assert [row["round"] for row in result["rounds"]] == [0, 1, 2]
    for row in result["rounds"]:
        assert abs(row["reverse_kl"]) < 5 * row["standard_error"] + 0.02
        assert row["length"] > 2
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "KL(student ‖ teacher), nats per token" in page
    assert open_cache(tmp_path / "whole" / "round-2" / "cache").fingerprint["data"]["round"] == 2
    run(tmp_path / "parts", seconds=0.45 * taken)
    assert run(tmp_path / "parts") == 0
    assert digests(tmp_path / "parts", 2) == digests(tmp_path / "whole", 2)
    assert json.loads((tmp_path / "parts" / "rounds.json").read_text()) == result
