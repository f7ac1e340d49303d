"""Students built from parts, with the original's settings: projector, tower layer, attention."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from llavamod_offline.errors import ConfigError
from llavamod_offline.families.llava.checkpoint import load_llava
from tests.llavamod_offline.families.llava.building.test_projector import named, original, written
from tests.tiny import write_tiny_language_model, write_tiny_tower
from tests.train.conftest import World
from tests.train.reference import read_metrics
from tests.train.test_checkpoint import assert_same_run, train_until_sigterm
from train.config import StudentConfig, TrainConfig
from train.run import train
from train.student.make import make_student


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("parts")
    tower, text = write_tiny_tower(folder / "tower"), write_tiny_language_model(folder / "text", extra_rows=7)
    return f"student.vision_tower={tower}", f"student.language_model={text}", "student.checkpoint=null"


def align(world: World, output: Path, parts: tuple[str, ...], *settings: str) -> TrainConfig:
    return world.config("align", output, *parts, *settings)


def test_a_linear_projector_stays_linear_through_the_stages(
    world: World, tmp_path: Path, parts: tuple[str, ...]
) -> None:
    """One stage's run, stopped in the middle, and a run of the next stage from its student."""
    linear = "student.projector_type=linear"
    train(align(world, tmp_path / "whole", parts, linear))
    assert train_until_sigterm(align(world, tmp_path / "align", parts, linear), lines=2) == 2
    train(align(world, tmp_path / "align", parts, linear))
    assert_same_run(tmp_path / "align", tmp_path / "whole")
    train(world.config("sft", tmp_path / "sft", f"student.checkpoint={tmp_path / 'align' / 'student'}"))
    before = torch.zeros(64, 32)
    for run in ("align", "sft"):
        plain = AutoModelForImageTextToText.from_pretrained(tmp_path / run / "student")
        projector = plain.model.multi_modal_projector
        assert torch.equal(projector.linear_2.weight, torch.eye(64)), run
        assert not projector.linear_2.bias.any()
        assert not torch.equal(projector.linear_1.weight, before), run
        before = projector.linear_1.weight.detach()


def test_a_run_starts_from_an_mm_projector_and_only_from_that(
    world: World, tmp_path: Path, parts: tuple[str, ...]
) -> None:
    """Its path may change, its content may not."""
    projector = original("mlp2x_gelu")
    first = written(tmp_path / "first", named(projector.half()))
    config = align(world, tmp_path / "run", parts, f"student.projector={first}", "trainable=[text]", "steps=3")
    started, second = make_student(config.student, seed=0), projector.state_dict()["2.weight"].float()
    assert torch.equal(started.model.multi_modal_projector.linear_2.weight, second)
    train_until_sigterm(config, lines=1)
    other = written(tmp_path / "other", named(original("mlp2x_gelu")))
    with pytest.raises(ConfigError, match=r"^student: the run in .* was started with a checkpoint of digest "):
        train(replace(config, student=replace(config.student, projector=str(other))))
    moved = first.rename(tmp_path / "moved.bin")
    train(replace(config, student=replace(config.student, projector=str(moved))))
    exported = load_llava(tmp_path / "run" / "student").model.multi_modal_projector
    assert torch.equal(exported.linear_2.weight, second)


def test_distillation_may_start_from_parts_and_a_projector(
    world: World, tmp_path: Path, parts: tuple[str, ...]
) -> None:
    """As in the original's dense2dense_distillation.sh."""
    file = written(tmp_path / "first", named(original("mlp2x_gelu"), "model.mm_projector.image_spatial_proj."))
    settings = (*parts, f"student.projector={file}", "optim.projector_lr=1e-4", "data.group_by_modality=true")
    train(world.config("mimic_dense", tmp_path / "run", *settings))
    log = read_metrics(tmp_path / "run")
    assert log[-1]["loss"] < log[0]["loss"]


def test_the_towers_layers_and_tokens_last_into_the_export(
    world: World, tmp_path: Path, parts: tuple[str, ...]
) -> None:
    chosen = ("student.vision_feature_layer=[-1,-2]", "student.vision_feature_select_strategy=full")
    train(align(world, tmp_path / "run", parts, *chosen, "steps=2"))
    config = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "student").config
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == ([-1, -2], "full")
    assert config.image_seq_length == 10


@pytest.mark.parametrize("name", ["projector", "projector_type", "vision_feature_layer"])
def test_what_a_checkpoint_says_is_refused_beside_it(world: World, tmp_path: Path, name: str) -> None:
    value = {"projector": "p.bin", "projector_type": "linear"}.get(name, "-2")
    with pytest.raises(ConfigError, match=rf"^student\.{name}: student.checkpoint says it already: remove it, or "):
        world.config("sft", tmp_path / "run", f"student.{name}={value}")


def test_attention_may_change_and_changes_nothing_but_rounding(world: World, tmp_path: Path) -> None:
    for attention in ("eager", "sdpa"):
        made = make_student(StudentConfig(checkpoint=str(world.student)), seed=0, attention=attention)
        modules = (made.model.language_model, made.model.vision_tower)
        assert {module.config._attn_implementation for module in modules} == {attention}
    train(world.config("sft", tmp_path / "whole", "engine.attention=sdpa"))
    train_until_sigterm(world.config("sft", tmp_path / "run", "engine.attention=eager"), lines=2)
    train(world.config("sft", tmp_path / "run"))
    losses = [[entry["loss"] for entry in read_metrics(tmp_path / run)] for run in ("run", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for dtype in ("float32", "bfloat16"):
        settings = ("engine.attention=flash_attention_2", f"engine.dtype={dtype}")
        with pytest.raises(ConfigError, match=r"^engine\.attention: flash_attention_2 needs a GPU"):
            train(world.config("sft", tmp_path / "flash", *settings))
    assert not (tmp_path / "flash").exists()
