"""The join of samples and records, and the errors found before the first step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llavamod_offline.config import dump_config
from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.errors import DataError, LlavaModError
from tests.tiny import tiny_image, tiny_samples, write_tiny_language_model, write_tiny_llava, write_tiny_tower
from tests.train.conftest import World, write_cache
from tests.train.reference import read_metrics
from train.run import train


def test_samples_without_a_record_are_refused_or_dropped(world: World, tmp_path: Path) -> None:
    """The cache has 20 of 24 samples; with dropping, training uses only those, and the summary counts the rest."""
    write_set(tiny_samples(24)[:20], tmp_path / "fewer")
    cache = write_cache(tmp_path / "cache", tmp_path / "fewer", world.teacher)
    with pytest.raises(DataError, match=r"4 of 24 samples have no record .*\(tiny-0020, tiny-0021, tiny-0022, …\)"):
        train(world.config("mimic_dense", tmp_path / "refused", f"cache.path={cache}"))
    assert not (tmp_path / "refused").exists()
    settings = (f"cache.path={cache}", "cache.missing=drop", "batch.global_size=20", "steps=2")
    dropped = train(world.config("mimic_dense", tmp_path / "dropped", *settings))
    assert (dropped.samples, dropped.samples_without_record) == (20, 4)
    same = train(world.config("mimic_dense", tmp_path / "same", *settings, f"data.set={tmp_path / 'fewer'}"))
    assert dropped.metrics["loss"] == same.metrics["loss"]


def test_samples_that_are_too_long_are_left_out_on_request(world: World, tmp_path: Path) -> None:
    samples = tiny_samples(16)
    long = Sample("long", (Turn("user", "Say it."), Turn("assistant", "red circle " * 60)))
    write_set([*samples, long], tmp_path / "set")
    settings = (f"data.set={tmp_path / 'set'}", "max_length=160", "batch.global_size=17", "batch.micro_size=17")
    with pytest.raises(DataError, match=r"sample 'long': \d+ tokens, more than max_length 160"):
        train(world.config("sft", tmp_path / "refused", *settings, "steps=1"))
    drop = ("data.too_long=drop", "batch.global_size=16", "batch.micro_size=16", "steps=1")
    summary = train(world.config("sft", tmp_path / "run", *settings, *drop))
    assert (summary.samples, summary.samples_too_long) == (16, 1)
    (line,) = (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()
    assert {"file": "samples", "row": 16}.items() <= json.loads(line).items()
    assert json.loads(line)["key"] == "long"


def test_answers_or_images_the_teacher_did_not_see_are_refused(world: World, tmp_path: Path) -> None:
    """Same keys, but one answer differs in its last word; then the same answers over another image."""
    samples = tiny_samples(4)
    turn = Turn("assistant", samples[1].turns[-1].text.replace(".", "!"))
    other_answer = Sample(samples[1].key, (*samples[1].turns[:-1], turn), samples[1].images, ("png",))
    other_picture = Sample(samples[1].key, samples[1].turns, (tiny_image(99),), ("png",))
    cache = write_cache(tmp_path / "cache", write_set_of(samples, tmp_path / "set"), world.teacher)
    for name, changed, problem in (
        ("answer", other_answer, r"sample 'tiny-0001' \(response\): its supervised ids differ from the cache's: at"),
        ("picture", other_picture, r"'tiny-0001' \(response\): its text or images differ from those captured"),
    ):
        data = write_set_of([samples[0], changed, *samples[2:]], tmp_path / name)
        settings = (f"data.set={data}", f"cache.path={cache}", "batch.global_size=4", "workers=1")
        with pytest.raises(LlavaModError, match=problem) as caught:
            train(world.config("mimic_dense", tmp_path / f"run-{name}", *settings))
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_command_ends_after_an_error_in_a_worker(world: World, tmp_path: Path) -> None:
    """Workers ignore SIGTERM, so a process that forgets to shut them down would wait for them for ever."""
    samples = tiny_samples(4)
    cache = write_cache(tmp_path / "cache", write_set_of(samples, tmp_path / "set"), world.teacher)
    turns = (*samples[1].turns[:-1], Turn("assistant", "Something else."))
    changed = Sample(samples[1].key, turns, samples[1].images, ("png",))
    data = write_set_of([samples[0], changed, *samples[2:]], tmp_path / "changed")
    settings = (f"data.set={data}", f"cache.path={cache}", "batch.global_size=4", "workers=2")
    config = world.config("mimic_dense", tmp_path / "run", *settings)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    command = [str(Path(sys.executable).parent / "train-student"), str(tmp_path / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2, done.stderr
    assert "its supervised ids differ from the cache's" in done.stderr.splitlines()[-1]


def write_set_of(samples: list[Sample], folder: Path) -> Path:
    """Pack samples."""
    write_set(samples, folder)
    return folder


def test_students_of_other_sizes_and_templates_share_a_cache(world: World, tmp_path: Path) -> None:
    """One cache for a deeper student, a narrower one with more LM head rows, and another wording of the prompt."""
    wide = write_tiny_llava(tmp_path / "wide", hidden=96, layers=1, head_rows=448, seed=3, tied=False)
    losses = []
    for number, settings in enumerate(([f"student.checkpoint={wide}"], ["image_aspect=square"], [])):
        train(world.config("mimic_dense", tmp_path / str(number), *settings, "steps=3"))
        log = read_metrics(tmp_path / str(number))
        assert log[-1]["loss"] < log[0]["loss"]
        losses.append(log[0]["loss"])
    assert len(set(losses)) == 3


def test_a_student_is_built_from_a_tower_and_a_language_model(world: World, tmp_path: Path) -> None:
    tower = write_tiny_tower(tmp_path / "tower")
    language_model = write_tiny_language_model(tmp_path / "lm")
    parts = ("student.checkpoint=null", f"student.vision_tower={tower}", f"student.language_model={language_model}")
    first = train(world.config("align", tmp_path / "align", *parts))
    assert first.trained_parameters == 32 * 64 + 64 + 64 * 64 + 64
    second = train(world.config("mimic_dense", tmp_path / "mimic", f"student.checkpoint={first.student}"))
    assert second.finished


@pytest.mark.parametrize(
    ("stage", "settings", "problem"),
    [
        ("sft", ["student.checkpoint={chats}"], "no config.json"),
        ("sft", ["data.set={student}"], "has no set.json"),
        ("sft", ["data.set={pairs}"], "is a preference, but the stage needs conversations"),
        ("preference", ["data.set={chats}"], "is a conversation, but the stage needs preferences"),
        ("mimic_dense", ["cache.path={chats}"], "it is not a teacher cache"),
        (
            "preference",
            ["cache.path={chats_cache}"],
            "cache.path: .* holds response, but stage preference needs chosen, rejected",
        ),
        ("mimic_dense", ["loss.temperature=3.0"], "loss.temperature: cache .* supports temperatures 1, 1.5, 2, 4"),
        ("mimic_dense", ["student.checkpoint={other_tokenizer}"], "tokenizer"),
        ("mimic_sparse", ["student.upcycle=null"], "student.upcycle: .* is dense"),
        ("mimic_sparse", ["student.upcycle.layers=second"], "layers"),
        ("sft", ["template=vicuna"], "template 'vicuna' is unknown"),
        ("sft", ["trainable=[lm_head]"], "trainable: no parameter of this student belongs to 'lm_head'"),
        ("sft", ["data.holdout=24"], "nothing is left: lower data.holdout"),
        ("sft", ["output={chats}/set.json/x"], "output: .* cannot be written"),
        ("sft", ["output={holds_student}"], "output: .* holds a student not written by train-student"),
    ],
)
def test_what_does_not_fit_is_said_before_the_first_step(
    world: World, tmp_path: Path, stage: str, settings: list[str], problem: str
) -> None:
    folders = {name: str(value) for name, value in vars(world).items()}
    folders["other_tokenizer"] = str(tmp_path / "other")
    if "{other_tokenizer}" in settings[0]:
        write_tiny_llava(tmp_path / "other", vocabulary=320)
    folders["holds_student"] = str(tmp_path / "holds")
    (tmp_path / "holds" / "student").mkdir(parents=True)
    with pytest.raises(LlavaModError, match=problem) as caught:
        train(world.config(stage, tmp_path / "run", *(setting.format(**folders) for setting in settings)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert not torch.distributed.is_initialized()
    assert "LOCAL_RANK" not in os.environ


def test_a_sparse_checkpoint_is_not_upcycled_again(world: World, tmp_path: Path) -> None:
    first = train(world.config("mimic_sparse", tmp_path / "first", "steps=1"))
    sparse = f"student.checkpoint={first.student}"
    with pytest.raises(LlavaModError, match=r"student\.upcycle: .* is already sparse: set student\.upcycle to null"):
        train(world.config("mimic_sparse", tmp_path / "second", sparse))
    with pytest.raises(LlavaModError, match=r"student\.kind: .* is sparse: set student\.kind to sparse"):
        train(world.config("sft", tmp_path / "third", sparse))
