"""The remedies that a message names after a stop work when the run is resumed, and are recorded everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llavamod_offline.config import load_config
from llavamod_offline.data.order.stream import Order
from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Sample
from llavamod_offline.errors import ConfigError, DataError, ModelError
from tests.tiny import break_image, tiny_image, tiny_samples, write_tiny_set
from tests.train.conftest import World
from tests.train.reference import read_metrics
from tests.train.test_checkpoint import assert_same_run, train_until_sigterm
from train import checkpoint
from train.checkpoint import latest_checkpoint
from train.config import TrainConfig
from train.run import train

ONE_BY_ONE = ("batch.global_size=1", "batch.micro_size=1", "steps=null")


def positions_of(world: World, samples: list[Sample], folder: Path) -> int:
    """The number of supervised positions in an epoch over the samples."""
    write_set(samples, folder / "set")
    return train(world.config("sft", folder / "run", f"data.set={folder / 'set'}", *ONE_BY_ONE)).positions


def test_settings_that_are_remedies_may_change_and_everything_tells_of_it(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "run"
    train_until_sigterm(world.config("sft", output, "steps=6"), lines=2)
    remedies = ("optim.lr=5e-4", "optim.grad_clip=0.5", "max_length=1024", "data.too_long=drop")
    with pytest.raises(ConfigError, match=r"^seed: the run in .* with 0, not 3; steps: with 6, not 7: "):
        train(world.config("sft", output, "steps=7", "seed=3", *remedies))
    summary = train(world.config("sft", output, "steps=6", *remedies))
    assert summary.finished
    assert [entry["step"] for entry in read_metrics(output)] == [1, 2, 3, 4, 5, 6]
    plain = [entry["lr"] for entry in read_metrics(output)]
    assert plain[2] < 0.6 * plain[1]
    lines = ["optim.lr: 0.001 → 0.0005", "optim.grad_clip: 1.0 → 0.5", "max_length: 2048 → 1024"]
    lines.append("data.too_long: error → drop")
    card = (output / "student" / "README.md").read_text()
    for line in lines:
        assert line in caplog.text
        assert f"- after step 2: {line}" in card
    content = json.loads((output / "summary.json").read_bytes())
    assert sorted(content["changes"]) == sorted(f"after step 2: {line}" for line in lines)
    assert content["settings"]["optim.lr"] == 5e-4
    assert load_config(TrainConfig, [output / "config.yaml"], []).optim.lr == 5e-4
    assert train(world.config("sft", output, "steps=6", *remedies)) == summary
    with pytest.raises(ConfigError, match=r"^optim\.lr: the finished run"):
        train(world.config("sft", output, "steps=6", *remedies, "optim.lr=1e-3"))


def test_a_lower_learning_rate_goes_on_after_a_nan(world: World, tmp_path: Path) -> None:
    output, given = tmp_path / "run", ("steps=8", "save_steps=0")
    train_until_sigterm(world.config("sft", output, *given), lines=2)
    message = r"^step \d+: the (loss|gradient) is \w+ .*: lower optim\.lr, .* rerun to resume from the last checkpoint$"
    with pytest.raises(ModelError, match=message):
        train(world.config("sft", output, *given, "optim.lr=1e19", "optim.grad_clip=0"))
    assert train(world.config("sft", output, *given, "optim.lr=1e-4", "optim.grad_clip=1")).finished
    assert [entry["lr"] > 5e-4 for entry in read_metrics(output)] == [True] * 2 + [False] * 6


@pytest.mark.parametrize("repair", ["image", "sample"])
def test_an_image_that_cannot_be_decoded_stops_the_run_and_a_repaired_set_goes_on(
    world: World, tmp_path: Path, repair: str
) -> None:
    """Each remaining sample is trained on once in the epoch, including those before the stop."""
    samples = tiny_samples(24)
    data, output = write_tiny_set(tmp_path / "set", 24), tmp_path / "run"
    settings = (f"data.set={data}", *ONE_BY_ONE)
    order = Order(24, seed=0, batch_size=1).places(0, 24).tolist()
    done = next(step for step in range(10, 24) if samples[order[step]].images)
    break_image(data, order[done])
    bad = samples[order[done]]
    with pytest.raises(DataError, match=rf"^image '{bad.key} image 0': cannot be decoded: .*: pack the set again with"):
        train(world.config("sft", output, *settings, "save_steps=0"))
    assert latest_checkpoint(output) == output / "checkpoints" / f"step-{done:08d}"
    left = samples if repair == "image" else [sample for sample in samples if sample is not bad]
    if repair == "image":  # it can be decoded, but is a different image
        fixed = Sample(
            bad.key, bad.turns, tuple(tiny_image(99 + n) for n in range(len(bad.images))), bad.image_extensions
        )
        left = [fixed if sample is bad else sample for sample in samples]
    write_set(left, data, overwrite=True)
    summary = train(world.config("sft", output, *settings))
    assert summary.steps == len(left)
    assert summary.positions == positions_of(world, left, tmp_path / "whole")
    assert f"- after step {done}: data.set: a set of digest " in (output / "student" / "README.md").read_text()


def test_a_checkpoint_is_not_written_again_when_the_next_step_fails(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be removed first: a kill in between would lose it."""
    written: list[str] = []
    write = checkpoint._write

    def noted(target: Path, *rest: Any) -> None:
        written.append(target.name)
        write(target, *rest)

    monkeypatch.setattr(checkpoint, "_write", noted)
    data, order = write_tiny_set(tmp_path / "set", 24), Order(24, seed=0, batch_size=1).places(0, 24).tolist()
    bad = next(step for step in range(3, 24) if tiny_samples(24)[order[step]].images)
    break_image(data, order[bad])
    with pytest.raises(DataError, match="cannot be decoded"):
        train(world.config("sft", tmp_path / "run", f"data.set={data}", *ONE_BY_ONE, "save_steps=1"))
    assert written == [f"step-{step:08d}" for step in range(1, bad + 1)]


def test_samples_that_a_cache_has_lost_may_be_left_out(world: World, tmp_path: Path) -> None:
    """As the message suggests."""
    output = tmp_path / "run"
    train_until_sigterm(world.config("mimic_dense", output, "steps=6"), lines=2)
    assert train(world.config("mimic_dense", output, "steps=6", "cache.missing=drop")).finished


def test_dropped_samples_leave_the_others_their_order(world: World, tmp_path: Path) -> None:
    output = tmp_path / "run"
    train_until_sigterm(world.config("sft", output, *ONE_BY_ONE), lines=5)
    limit = 110
    drop = ("data.too_long=drop", f"max_length={limit}")
    dropped = train(world.config("sft", output, *ONE_BY_ONE, *drop))
    whole = train(world.config("sft", tmp_path / "whole", *ONE_BY_ONE))
    assert 0 < dropped.samples_too_long < 20
    lines, others = read_metrics(output), read_metrics(tmp_path / "whole")
    tokens = [entry["tokens"] for entry in others]
    assert len(set(tokens)) > 5
    assert [entry["tokens"] for entry in lines] == tokens[:5] + [count for count in tokens[5:] if count <= limit]
    assert whole.steps == 24


@pytest.mark.parametrize("setting", ["data.weights={tiny: 1.5}", "data.group_by_length=true", "data.window=2"])
def test_a_plain_stop_changes_nothing_in_any_order(world: World, tmp_path: Path, setting: str) -> None:
    data = write_tiny_set(tmp_path / "set", 24, shard_samples=5)
    settings = (f"data.set={data}", setting, "batch.global_size=2", "batch.micro_size=2", "steps=10")
    train_until_sigterm(world.config("sft", tmp_path / "run", *settings), lines=4)
    train(world.config("sft", tmp_path / "run", *settings))
    train(world.config("sft", tmp_path / "whole", *settings))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_another_set_is_no_repaired_one(world: World, tmp_path: Path) -> None:
    output = tmp_path / "run"
    train_until_sigterm(world.config("sft", output, "steps=4"), lines=1)
    strangers = [
        Sample(f"other-{number}", sample.turns, sample.images, sample.image_extensions)
        for number, sample in enumerate(tiny_samples(24))
    ]
    write_set(strangers, tmp_path / "set")
    with pytest.raises(ConfigError, match=r"^data\.set: the run in .* with a set of digest .*, not a set of"):
        train(world.config("sft", output, "steps=4", f"data.set={tmp_path / 'set'}"))
