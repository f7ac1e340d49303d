"""LoRA students: numbers equal to a slow reference, plain checkpoints, stops, and several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from llavamod_offline.config import dump_config
from llavamod_offline.errors import ConfigError
from llavamod_offline.families.llava.building import build_llava
from llavamod_offline.families.llava.checkpoint import load_llava
from tests.llavamod_offline.models.batches import make_batch
from tests.tiny import write_tiny_language_model, write_tiny_tower
from tests.train.conftest import World, wait_for_lines
from tests.train.reference import Reader, read_metrics, train_plainly
from tests.train.test_checkpoint import assert_same_run, train_until_sigterm
from tests.train.test_processes import assert_equal_runs, run_two
from train.checkpoint import latest_checkpoint, load_weights
from train.config import TrainConfig
from train.engine.optim import choose_trainable
from train.metrics import METRICS_NAME
from train.run import train
from train.stages.build import Objective, StudentWithLoss
from train.student.lora import add_adapters
from train.student.make import make_student

EXACT = ("student.lora.rank=4", "student.lora.alpha=8", "student.lora.dropout=0", "trainable=[projector]")
DROPPING = (*EXACT[:2], "student.lora.dropout=0.2", "trainable=[projector,embeddings]", "optim.projector_lr=1e-2")


def logits(model: Any, student: Path) -> Tensor:
    """The logits of a model on samples with one, two and no images."""
    batch = make_batch(student, [0, 3, 5])
    with torch.no_grad():
        found: Tensor = model.eval()(
            input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, pixel_values=batch.pixel_values_ICHW
        ).logits[batch.attention_mask_BT.bool()]
    return found


def with_weights(config: TrainConfig) -> Any:
    """The student of a run's last checkpoint, with its adapters."""
    model = make_student(config.student, seed=config.seed)
    choose_trainable(model, config.trainable)
    checkpoint = latest_checkpoint(Path(config.output))
    assert checkpoint is not None
    load_weights(checkpoint, StudentWithLoss(model, Objective(lambda *_: pytest.fail("no step is made"), lambda _: 0)))
    return model


@pytest.mark.parametrize(("rank", "zero_stage"), [(64, 0), (64, 2), (2, 0), (2, 1), (2, 3)])
def test_adapters_equal_a_slow_reference(world: World, tmp_path: Path, rank: int, zero_stage: int) -> None:
    """The reference adds (alpha / rank) · B·A·x to each layer's output, sample by sample; also at full rank."""
    settings = (*EXACT, f"student.lora.rank={rank}", "student.lora.targets=[attention.q_proj,mlp]", "steps=6")
    config = world.config("sft", tmp_path / "run", *settings, f"engine.zero_stage={zero_stage}")
    start = make_student(config.student, seed=0).state_dict()
    reader = Reader(world.student, world.chats)
    trained = reader.freeze_all_but("multi_modal_projector")
    layers = {}
    for name, module in reader.model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("model.language_model") and name.endswith(_ADAPTED):
            a_RI, b_OR = (nn.Parameter(start[f"{name}.lora_{part}.default.weight"].clone()) for part in "AB")
            assert not b_OR.any()
            module.register_forward_hook(_adding(a_RI, b_OR, 8 / rank))
            trained += [a_RI, b_OR]
            layers[name] = (module.weight, a_RI, b_OR)
    assert len(layers) == 8

    def loss_of_step(step: int) -> Tensor:
        answers = [reader.answer(sample) for sample in reader.step_samples(step, 8)]
        return -torch.cat([answer.target_log_probs_N for answer in answers]).mean()

    losses, norms = train_plainly(trained, loss_of_step, steps=6, rate=1e-3)
    summary = train(config)
    log = read_metrics(tmp_path / "run")
    assert [entry["loss"] for entry in log] == pytest.approx(losses, rel=1e-5)
    assert [entry["grad_norm"] for entry in log] == pytest.approx(norms, rel=1e-4)
    exported = load_llava(tmp_path / "run" / "student").state_dict()
    for name, (weight, a_RI, b_OR) in layers.items():
        expected = (weight + 8 / rank * b_OR @ a_RI).detach()
        torch.testing.assert_close(exported[f"{name}.weight"], expected, rtol=1e-3, atol=1e-4, msg=name)
    assert summary.parameters == sum(p.numel() for p in load_llava(world.student).parameters())
    assert summary.trained_parameters == sum(p.numel() for p in trained)


_ADAPTED = ("q_proj", "gate_proj", "up_proj", "down_proj")


def _adding(a_RI: Tensor, b_OR: Tensor, scale: float) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    return lambda _, inputs, output: output + scale * (inputs[0] @ a_RI.T) @ b_OR.T


@pytest.mark.parametrize("stage", ["align", "mimic_dense", "preference"])
@pytest.mark.parametrize("targets", ["[attention,mlp]", "[vision,projector,text]"])
def test_the_merged_export_computes_what_the_adapted_student_did(
    world: World, tmp_path: Path, stage: str, targets: str
) -> None:
    parts = "[]" if "projector" in targets else "[projector]"
    settings = (*EXACT[:3], f"student.lora.targets={targets}", f"trainable={parts}", "optim.lr=1e-2")
    config = world.config(stage, tmp_path / "run", *settings)
    train(config)
    student = tmp_path / "run" / "student"
    plain = AutoModelForImageTextToText.from_pretrained(student)
    before, after = load_llava(world.student), logits(plain, student)
    assert not any("lora" in name or "base_layer" in name for name in plain.state_dict())
    assert plain.state_dict().keys() == before.state_dict().keys()
    assert (after - logits(before, student)).abs().max() > 0.1
    torch.testing.assert_close(after, logits(with_weights(config), student), rtol=1e-5, atol=1e-4)
    log = read_metrics(tmp_path / "run")
    assert all(entry["grad_norm"] > 0 for entry in log)


def test_a_linear_projector_has_an_adapter_in_its_matrix_alone(tmp_path: Path) -> None:
    parts = write_tiny_tower(tmp_path / "tower"), write_tiny_language_model(tmp_path / "text")
    for kind, layers in (("linear", {"linear_1"}), ("mlp2x_gelu", {"linear_1", "linear_2"})):
        model = build_llava(*parts, seed=0, projector_type=kind)
        add_adapters(model, rank=2, alpha=1, dropout=0, targets=["projector"], seed=0)
        adapted = {name.split(".")[2] for name, _ in model.named_parameters() if "lora_A" in name}
        assert adapted == layers


@pytest.mark.parametrize(("trainable", "zero_stage"), [("[projector]", 0), ("[projector]", 3), ("[]", 2)])
def test_kept_adapters_are_a_peft_folder_for_the_checkpoint(
    world: World, tmp_path: Path, trainable: str, zero_stage: int
) -> None:
    """With the projector, if that is fully trained, and beside the merged student."""
    settings = ("student.lora.keep_adapters=true", f"trainable={trainable}", f"engine.zero_stage={zero_stage}")
    train(world.config("sft", tmp_path / "run", *EXACT, *settings, "optim.lr=1e-2"))
    student, adapters = tmp_path / "run" / "student", tmp_path / "run" / "adapters"
    config = json.loads((adapters / "adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == str(world.student)
    base = AutoModelForImageTextToText.from_pretrained(config["base_model_name_or_path"])
    model = peft.PeftModel.from_pretrained(base, adapters)
    merged = logits(AutoModelForImageTextToText.from_pretrained(student), student)
    torch.testing.assert_close(logits(model, student), merged, rtol=1e-5, atol=1e-4)


def test_a_stopped_run_with_dropout_is_the_undisturbed_one(world: World, tmp_path: Path) -> None:
    train(world.config("mimic_dense", tmp_path / "whole", *DROPPING, "steps=6"))
    config = world.config("mimic_dense", tmp_path / "run", *DROPPING, "steps=6", "engine.gradient_checkpointing=true")
    assert train_until_sigterm(config, lines=3) == 3
    with pytest.raises(ConfigError, match=r"^student\.lora\.rank: the run in .* was started with 4, not 8"):
        train(world.config("mimic_dense", tmp_path / "run", *DROPPING, "steps=6", "student.lora.rank=8"))
    with pytest.raises(ConfigError, match=r"^seed: "):
        train(world.config("mimic_dense", tmp_path / "run", *DROPPING, "steps=6", "seed=5"))
    train(config)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    kept = sum(tensor.numel() for tensor in _weights(tmp_path / "run").values())
    assert kept == 4 * 2 * (64 * 4 + 64 + 2 * 32 + 64) + 4 * 2 * 3 * (64 + 128) + _full(world)


def _weights(output: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    checkpoint = latest_checkpoint(output)
    assert checkpoint is not None
    return load_file(checkpoint / "weights.safetensors")


def _full(world: World) -> int:
    named = load_llava(world.student).named_parameters()
    return sum(p.numel() for name, p in named if "projector" in name or "embed_tokens" in name)


def test_a_killed_run_is_the_undisturbed_one(world: World, tmp_path: Path) -> None:
    settings = (*DROPPING, "steps=8", "save_steps=2")
    train(world.config("sft", tmp_path / "whole", *settings))
    config = world.config("sft", tmp_path / "run", *settings)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("train-student")), str(tmp_path / "config.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )
    wait_for_lines(tmp_path / "run" / METRICS_NAME, 3)
    process.kill()
    assert b"Traceback" not in process.communicate()[1]
    train(config)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "zero_stage"), [("preference", 2), ("mimic_dense", 3)])
def test_two_processes_equal_one(world: World, tmp_path: Path, stage: str, zero_stage: int) -> None:
    settings = (*EXACT, "steps=10", "batch.micro_size=1", "data.holdout=4", "eval_steps=5")
    done = run_two(world.config(stage, tmp_path / "two", *settings), tmp_path, f"engine.zero_stage={zero_stage}")
    assert done.returncode == 0, done.stderr
    train(world.config(stage, tmp_path / "one", *settings))
    assert_equal_runs(tmp_path / "two", tmp_path / "one")


def test_bfloat16_is_merged_in_float32(world: World, tmp_path: Path) -> None:
    config = world.config("sft", tmp_path / "run", *EXACT, "engine.dtype=bfloat16", "optim.lr=1e-2")
    train(config)
    model = with_weights(config)
    layer = model.model.language_model.layers[0].mlp.up_proj
    exported = load_llava(tmp_path / "run" / "student", torch.bfloat16).state_dict()
    a_RI, b_OR = (getattr(layer, f"lora_{part}")["default"].weight.bfloat16().float() for part in "AB")
    expected = (layer.base_layer.weight.bfloat16().float() + 2 * b_OR @ a_RI).bfloat16()
    assert torch.equal(exported["model.language_model.layers.0.mlp.up_proj.weight"], expected)


def test_a_sparse_student_has_adapters_beside_its_experts(world: World, tmp_path: Path) -> None:
    settings = (*EXACT[:3], "student.lora.targets=[attention]", "trainable=[projector,mlp,router]")
    train(world.config("mimic_sparse", tmp_path / "run", *settings))
    plain = load_llava(tmp_path / "run" / "student")
    assert plain.config.text_config.num_experts == 4
    with pytest.raises(ConfigError, match=r"^student\.lora\.targets: 'mlp' holds experts, which are not linear layers"):
        train(world.config("mimic_sparse", tmp_path / "other", *EXACT))
    assert not (tmp_path / "other").exists()


def test_layers_that_are_not_there_are_refused(world: World, tmp_path: Path) -> None:
    message = r"^student\.lora\.targets: 'attention.query' names no linear layer of this student: attention has k_p"
    with pytest.raises(ConfigError, match=message):
        train(world.config("sft", tmp_path / "run", *EXACT, "student.lora.targets=[attention.query]"))
    assert not (tmp_path / "run").exists()


_WITHOUT_PEFT = """
import sys
sys.modules["peft"] = None
from train.cli import main
main()
"""


def test_without_peft_a_run_is_refused_before_anything_is_written(world: World, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(dump_config(world.config("sft", tmp_path / "run", *EXACT)))
    command = [sys.executable, "-c", _WITHOUT_PEFT, "mine.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.endswith("\nerror: student.lora needs peft: pip install 'llavamod-offline[lora]'\n")
    assert not (tmp_path / "run").exists()
