"""What `train-student measure` reports about a student, compared with plain transformers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from llavamod_offline.config import load_config
from llavamod_offline.errors import ConfigError, DataError
from tests.tiny import write_tiny_set
from tests.train.conftest import EXHAUSTIVE, World, write_cache
from tests.train.reference import Reader
from train import cli
from train.config import MeasureConfig
from train.measure import BINS, Measurement, measure
from train.run import train


def measured(world: World, *settings: str) -> Measurement:
    given = [f"student.checkpoint={world.student}", f"data.set={world.chats}", "batch_size=5", "workers=0"]
    return measure(load_config(MeasureConfig, (), [*given, *settings]))


def test_it_equals_plain_log_probs_of_student_and_teacher(world: World) -> None:
    found = measured(world, f"cache.path={world.chats_cache}")
    student, teacher = Reader(world.student, world.chats), Reader(world.teacher, world.chats)
    samples = [student.samples.read(row) for row in range(len(student.samples))]
    with torch.no_grad():
        own, its = ([reader.answer(sample) for sample in samples] for reader in (student, teacher))
    q_NV, p_NV = (torch.cat([answer.log_probs_NV for answer in answers]).double() for answers in (own, its))
    ids_N = torch.cat([answer.target_ids_N for answer in own])
    confidence_N, choice_N = q_NV.exp().max(-1)
    hits_N = (choice_N == ids_N).double()
    error = 0.0
    for place in range(BINS):
        inside_N = (confidence_N > place / BINS) & (confidence_N <= (place + 1) / BINS)
        error += abs(float((hits_N[inside_N] - confidence_N[inside_N]).sum())) / len(ids_N)
    assert (found.samples, found.positions) == (24, len(ids_N))
    assert found.kl == pytest.approx(float((p_NV.exp() * (p_NV - q_NV)).sum(-1).mean()), abs=1e-5)
    assert found.entropy == pytest.approx(float(-(p_NV.exp() * p_NV).sum(-1).mean()), abs=1e-4)
    assert found.agreement == pytest.approx(float((p_NV.argmax(-1) == choice_N).double().mean()))
    assert found.cross_entropy == pytest.approx(-float(q_NV.gather(1, ids_N[:, None]).mean()), abs=1e-5)
    assert found.accuracy == pytest.approx(float(hits_N.mean()))
    assert found.calibration_error == pytest.approx(error, abs=1e-6)


def test_the_entropy_of_another_temperature_is_not_shown_beside_the_kl(world: World, tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", world.chats, world.teacher, "capture.temperature=2")
    found = measured(world, f"cache.path={cache}")
    assert found.entropy is None
    assert found.kl is not None


def test_without_a_cache_it_compares_with_the_answers_alone(world: World) -> None:
    found, whole = measured(world), measured(world, f"cache.path={world.chats_cache}")
    assert (found.kl, found.entropy, found.agreement) == (None, None, None)
    assert found.cross_entropy == pytest.approx(whole.cross_entropy, abs=1e-6)
    assert found.calibration_error == pytest.approx(whole.calibration_error, abs=1e-6)


def test_records_of_all_positions_are_measured_where_they_predict_answers(world: World, tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", world.chats, world.teacher, *EXHAUSTIVE, "capture.positions=all")
    found, response = measured(world, f"cache.path={cache}"), measured(world, f"cache.path={world.chats_cache}")
    assert found.positions == response.positions
    assert found.kl == pytest.approx(response.kl, abs=1e-6)


def test_tail_samples_estimate_the_same_kl(world: World, tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", world.chats, world.teacher, "capture.preset=compact")
    found, exact = measured(world, f"cache.path={cache}"), measured(world, f"cache.path={world.chats_cache}")
    assert found.kl == pytest.approx(exact.kl, rel=0.1)


def test_a_sparse_student_is_measured_like_a_dense_one(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(world.config("mimic_sparse", run, "steps=1", "optim.lr=1e-12", "student.capacity_factor=null"))
    found, dense = (
        measured(world, f"student.checkpoint={model}", f"cache.path={world.chats_cache}")
        for model in (run / "student", world.student)
    )
    assert found.kl == pytest.approx(dense.kl, abs=1e-5)


def test_the_command_prints_and_writes_the_figures(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "unseen.json"
    given = [f"student.checkpoint={world.student}", f"data.set={world.chats}", "workers=0"]
    given.append(f"cache.path={world.chats_cache}")
    monkeypatch.setattr(sys, "argv", ["train-student", "measure", *given, "--json", "-o", str(file)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(file.read_text())
    assert set(found) == set(Measurement.__dataclass_fields__)
    monkeypatch.setattr(sys, "argv", ["train-student", "measure", *given])
    with pytest.raises(SystemExit):
        cli.main()
    assert f"kl                 {found['kl']:.4f}\n" in capsys.readouterr().out


def test_what_cannot_be_measured_is_named(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cache"):
        measured(world, f"cache.path={world.pairs_cache}")
    with pytest.raises(ConfigError, match="batch_size"):
        measured(world, "batch_size=0")
    with pytest.raises(DataError, match="too_long"):
        measured(world, "max_length=20")
    other = write_tiny_set(tmp_path / "set", 3, preference=True)
    with pytest.raises(DataError):
        measured(world, f"data.set={other}")
