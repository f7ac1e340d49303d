"""Lengths are checked before the first step in every stage, and never measured twice."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.errors import DataError
from llavamod_offline.storage.disk_cache import FOLDER_VARIABLE
from tests.tiny import tiny_image, tiny_samples
from tests.train.conftest import World, write_cache
from train.data import lengths
from train.run import train

STAGES = ("align", "sft", "mimic_dense", "preference")


def lengthened(sample: Sample, words: int) -> Sample:
    more = " red" * words
    if sample.is_preference:
        turns, chosen = sample.turns, f"{sample.chosen}{more}"
    else:
        turns, chosen = (*sample.turns[:-1], Turn("assistant", f"{sample.turns[-1].text}{more}")), None
    return Sample(sample.key, turns, sample.images, sample.image_extensions, chosen, sample.rejected)


@pytest.mark.parametrize("stage", STAGES)
def test_samples_that_are_too_long_are_named_before_the_first_step(world: World, tmp_path: Path, stage: str) -> None:
    samples = tiny_samples(24, preference=stage == "preference")
    samples[7], samples[19] = lengthened(samples[7], 60), lengthened(samples[19], 120)
    write_set(samples, tmp_path / "set")
    settings = [f"data.set={tmp_path / 'set'}", "max_length=140"]
    if stage in ("mimic_dense", "preference"):
        settings.append(f"cache.path={write_cache(tmp_path / 'cache', tmp_path / 'set', world.teacher)}")
    key = samples[7].key
    message = (
        rf"^sample '{key}': \d+ tokens, more than max_length 140; 2 of 24 samples are longer, the longest has \d+: "
        r"set data\.too_long=drop to train without them, or raise max_length$"
    )
    with pytest.raises(DataError, match=message):
        train(world.config(stage, tmp_path / "run", *settings))
    assert not (tmp_path / "run").exists()
    assert train(world.config(stage, tmp_path / "run", *settings, "data.too_long=drop")).samples == 22
    rejected = [json.loads(line)["key"] for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert rejected == [samples[7].key, samples[19].key]
    assert train(world.config(stage, tmp_path / "longer", *settings, "max_length=2048")).samples == 24


def test_samples_beyond_the_students_own_context_are_too_long(world: World, tmp_path: Path) -> None:
    """A learned table of positions would end in an IndexError; rotary ones were never trained there."""
    student = tmp_path / "student"
    shutil.copytree(world.student, student)
    config = json.loads((student / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 110
    (student / "config.json").write_text(json.dumps(config))
    settings = (f"student.checkpoint={student}", "max_length=2048")
    message = (
        r"tokens, more than the 110 that the student takes; .*: set data\.too_long=drop .*, or choose another student$"
    )
    with pytest.raises(DataError, match=message):
        train(world.config("sft", tmp_path / "run", *settings))
    assert 0 < train(world.config("sft", tmp_path / "run", *settings, "data.too_long=drop")).samples < 24


@pytest.mark.parametrize(("setting", "way"), [("max_length=5", "raise max_length"), ("data.holdout=24", "lower data")])
def test_the_way_out_of_an_empty_set_fits_its_cause(world: World, tmp_path: Path, setting: str, way: str) -> None:
    with pytest.raises(DataError, match=rf"nothing is left: {way}"):
        train(world.config("sft", tmp_path / "run", setting, "data.too_long=drop"))


def test_lengths_are_measured_once_for_a_set_a_tokenizer_and_a_template(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    samples = tiny_samples(24)
    samples[3] = lengthened(samples[3], 470)
    write_set(samples, tmp_path / "set")

    def measured(*settings: str) -> int:
        caplog.clear()
        with pytest.raises(DataError, match="more than max_length"):
            train(world.config("sft", tmp_path / "run", f"data.set={tmp_path / 'set'}", *settings))
        return sum("measuring the lengths of" in record.message for record in caplog.records)

    assert measured("max_length=980") == 1
    assert measured("max_length=980") == 0
    assert measured("max_length=981") == 0  # the measurement serves any higher limit
    assert measured("max_length=100") == 1  # with a lower limit, more samples may be too long
    assert measured("max_length=100") == 0
    assert measured("max_length=980", "template=chatml") == 1
    write_set([*samples[:-1], lengthened(samples[-1], 1)], tmp_path / "set", overwrite=True)
    assert measured("max_length=980") == 1


def test_no_image_is_needed_for_a_length(world: World, tmp_path: Path) -> None:
    """An image counts as the number of tokens that the tower makes of it, whatever it shows."""
    turns = (Turn("user", "<image>\n<image>\nWhich?"), Turn("assistant", "red " * 100))
    write_set(
        [Sample(f"s{n}", turns, (tiny_image(n), tiny_image(n + 9)), ("png", "png")) for n in range(4)], tmp_path / "s"
    )
    settings = (f"data.set={tmp_path / 's'}", "batch.global_size=4", "steps=1")
    with pytest.raises(DataError, match="more than max_length 1; 4 of 4 samples") as caught:
        train(world.config("sft", tmp_path / "run", *settings, "max_length=1"))
    longest = int(str(caught.value).partition("': ")[2].partition(" ")[0])
    for limit, fits in ((longest - 1, False), (longest, True)):
        config = world.config("sft", tmp_path / "run", *settings, f"max_length={limit}")
        if fits:
            assert train(config).samples == 4
        else:
            with pytest.raises(DataError, match=f"{longest} tokens, more than max_length {limit}"):
                train(config)


def test_workers_measure_the_same(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are used for sets of many thousands of long samples."""
    monkeypatch.setattr(lengths, "_FEW", 0)
    monkeypatch.setattr(lengths, "_AT_ONCE", 5)
    refusals = set()
    for workers in (0, 2):
        monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / str(workers)))
        with pytest.raises(DataError, match="more than max_length 90; ") as caught:
            train(world.config("sft", tmp_path / "run", "max_length=90", f"workers={workers}"))
        refusals.add(str(caught.value))
        assert list((tmp_path / str(workers)).glob("lengths-*.npy"))
    assert len(refusals) == 1
