"""Learning rates of parts: a parameter gets that of the smallest part that contains it, on any engine; runs resume."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from llavamod_offline.errors import ConfigError
from llavamod_offline.families.llava.checkpoint import load_llava
from llavamod_offline.families.students.parts import model_parts
from tests.train.conftest import World
from tests.train.reference import Reader, read_metrics
from tests.train.test_checkpoint import assert_same_run, train_until_sigterm
from train.engine.optim import choose_trainable, make_optimizer
from train.run import train

RATES = {"projector": 3e-3, "text": 1e-3, "attention": 2e-4, "norms": 5e-3}
SETTINGS = ("optim.part_lr={projector: 3e-3, norms: 5e-3, attention: 2e-4}", "steps=5", "optim.weight_decay=0")


def rate_of(name: str) -> float:
    """The learning rate of a parameter of the tiny student, spelt out by name."""
    if "multi_modal_projector" in name:
        return RATES["projector"]
    if "norm" in name:
        return RATES["norms"]
    return RATES["attention"] if "self_attn" in name else RATES["text"]


def test_each_parameter_has_the_rate_of_the_smallest_part_that_holds_it(world: World) -> None:
    model = load_llava(world.student)
    choose_trainable(model, ["projector", "text"])
    optimizer = make_optimizer(
        model, model_parts(model), lr=1e-3, part_lr=RATES, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1
    )
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(found) == len(trained) == sum(len(group["params"]) for group in optimizer.param_groups)
    for name, parameter in trained.items():
        group = found[id(parameter)]
        assert group["lr"] == pytest.approx(rate_of(name)), name
        assert 1e-3 * group["rate_scale"] == pytest.approx(rate_of(name)), name
        assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0), name


@pytest.mark.parametrize("part", ["vision", "router", "lm_head"])
def test_a_rate_for_what_is_not_trained_is_refused(world: World, tmp_path: Path, part: str) -> None:
    with pytest.raises(ConfigError, match=f"^optim.part_lr: no trained parameter takes the rate of '{part}': "):
        train(world.config("sft", tmp_path / "run", f"optim.part_lr={{{part}: 1e-4}}"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("engine", ["zero_stage=0", "zero_stage=1", "zero_stage=2", "zero_stage=3"])
def test_rates_of_parts_equal_a_plain_adamw(world: World, tmp_path: Path, engine: str) -> None:
    reader = Reader(world.student, world.chats)
    trained = reader.freeze_all_but("language_model", "multi_modal_projector", "lm_head")
    rates = {id(p): rate_of(name) for name, p in reader.model.named_parameters()}
    optimizer = torch.optim.AdamW([{"params": [p]} for p in trained], betas=(0.9, 0.999), weight_decay=0.0)
    losses = []
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = rates[id(group["params"][0])] * 0.5 * (1 + math.cos(math.pi * step / 5))
        answers = [reader.answer(sample) for sample in reader.step_samples(step, 8)]
        loss = -torch.cat([answer.target_log_probs_N for answer in answers]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    train(world.config("sft", tmp_path / "run", *SETTINGS, f"engine.{engine}"))
    log = read_metrics(tmp_path / "run")
    assert [entry["loss"] for entry in log] == pytest.approx(losses, rel=1e-5)
    assert log[0]["part_lr"] == pytest.approx({"projector": 3e-3, "norms": 5e-3, "attention": 2e-4})
    exported = load_llava(tmp_path / "run" / "student").state_dict()
    for name, parameter in reader.model.named_parameters():
        torch.testing.assert_close(exported[name], parameter.detach(), rtol=1e-3, atol=1e-4, msg=name)


def test_the_short_name_is_the_projectors_rate_and_a_stopped_run_goes_on(world: World, tmp_path: Path) -> None:
    train(world.config("sft", tmp_path / "whole", "optim.part_lr={projector: 4e-3}", "steps=5"))
    config = world.config("sft", tmp_path / "run", "optim.projector_lr=4e-3", "steps=5")
    assert train_until_sigterm(config, lines=2) == 2
    train(config)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_rates_of_parts_may_change_when_a_run_is_resumed(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As may `optim.lr`, which the message after a NaN suggests; a finished run is refused."""
    output = tmp_path / "run"
    train_until_sigterm(world.config("sft", output, "optim.part_lr={projector: 4e-3}"), lines=2)
    train(world.config("sft", output, "optim.part_lr={projector: 2e-3, attention: 1e-4}"))
    assert "optim.part_lr.projector: 0.004 → 0.002" in caplog.text
    assert "optim.part_lr.attention: None → 0.0001" in caplog.text
    assert read_metrics(output)[-1]["part_lr"].keys() == {"projector", "attention"}
    with pytest.raises(ConfigError, match=r"^optim\.part_lr"):
        train(world.config("sft", output, "optim.part_lr={projector: 1e-3}"))
