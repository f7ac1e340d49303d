"""The loop against a slow, obvious trainer, and when it refuses to continue."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.errors import LlavaModError, ModelError
from llavamod_offline.families.llava.checkpoint import load_llava
from llavamod_offline.models.checkpoint import load_tokenizer
from tests.tiny import break_image, tiny_image, tiny_samples, write_tiny_set
from tests.train.conftest import World
from tests.train.reference import Reader, read_metrics, train_plainly
from train.run import train


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers of one token beside answers of forty, so that a mean of micro-batch means would be wrong."""
    samples = []
    for index, sample in enumerate(tiny_samples(16)):
        answer = "7" if index % 2 else "The square is red and the circle is blue. " * (1 + index // 4)
        samples.append(
            Sample(sample.key, (sample.turns[0], Turn("assistant", answer)), sample.images, sample.image_extensions)
        )
    folder = tmp_path_factory.mktemp("uneven") / "set"
    write_set(samples, folder)
    return folder


@pytest.mark.parametrize("micro_size", [8, 3, 1])
def test_a_step_is_one_mean_over_all_positions(world: World, uneven: Path, tmp_path: Path, micro_size: int) -> None:
    """Whatever the micro-batches, losses, gradient norms and weights are those of the plain trainer."""
    global_size = 9 if micro_size == 3 else 8
    reader = Reader(world.student, uneven)

    def loss_of_step(step: int) -> torch.Tensor:
        answers = [reader.answer(sample) for sample in reader.step_samples(step, global_size)]
        lengths = [len(answer.target_ids_N) for answer in answers]
        assert max(lengths) > 8 * min(lengths)
        return -torch.cat([answer.target_log_probs_N for answer in answers]).mean()

    trained = reader.freeze_all_but("language_model", "multi_modal_projector", "lm_head")
    losses, norms = train_plainly(trained, loss_of_step, steps=3, rate=1e-3)
    batch = (f"batch.global_size={global_size}", f"batch.micro_size={micro_size}", f"data.set={uneven}", "steps=3")
    train(world.config("sft", tmp_path / "run", *batch))
    log = read_metrics(tmp_path / "run")
    assert [entry["loss"] for entry in log] == pytest.approx(losses, rel=1e-5)
    assert [entry["grad_norm"] for entry in log] == pytest.approx(norms, rel=1e-4)
    ours = load_llava(tmp_path / "run" / "student").state_dict()
    for name, tensor in reader.model.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


def test_one_token_answers_are_learnt(world: World, tmp_path: Path) -> None:
    """The first answer token is predicted from the prompt's last: the student must learn to choose it."""
    answers = ("Yes", "the")  # each a single token of the tiny tokenizer
    samples = [
        Sample(
            f"q{index}",
            (Turn("user", f"<image>\nIs there a {shape}?"), Turn("assistant", answers[index % 2])),
            (tiny_image(index),),
            ("png",),
        )
        for index, shape in enumerate(("circle", "square", "triangle", "star"))
    ]
    write_set(samples, tmp_path / "set")
    reader = Reader(world.student, tmp_path / "set")
    settings = (f"data.set={tmp_path / 'set'}", "batch.global_size=4", "steps=25", "optim.lr=3e-3")
    summary = train(world.config("sft", tmp_path / "run", *settings))
    assert {len(reader.encoder.encode(sample, "response").supervised_N) for sample in samples} == {2}
    assert summary.positions == 25 * 4 * 2  # the answer and its end token
    trained = Reader(tmp_path / "run" / "student", tmp_path / "set")
    for sample in samples:
        answer = trained.answer(sample)
        assert answer.log_probs_NV.argmax(-1).tolist() == answer.target_ids_N.tolist(), sample.key


def test_only_the_named_parts_change(world: World, tmp_path: Path) -> None:
    before = load_file(world.student / "model.safetensors")
    expected = {
        "align": ("multi_modal_projector",),
        "sft": ("multi_modal_projector", "language_model", "lm_head"),
        "preference": ("multi_modal_projector", ".mlp."),
    }
    for stage, parts in expected.items():
        train(world.config(stage, tmp_path / stage, "steps=1"))
        after = load_file(tmp_path / stage / "student" / "model.safetensors")
        assert after.keys() == before.keys()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        allowed = {name for name in before if any(part in name for part in parts) and "vision_tower" not in name}
        assert changed == allowed


def test_the_exported_student_is_a_whole_checkpoint(world: World, tmp_path: Path) -> None:
    summary = train(world.config("align", tmp_path / "run", "steps=1"))
    model = load_llava(Path(summary.student))
    assert len(load_tokenizer(Path(summary.student))) == len(load_tokenizer(world.student))
    assert summary.parameters == sum(parameter.numel() for parameter in model.parameters())
    again = train(world.config("sft", tmp_path / "next", "steps=1", f"student.checkpoint={summary.student}"))
    assert again.finished


def test_the_next_stage_may_take_the_wording_of_the_one_before(world: World, tmp_path: Path) -> None:
    """The exported folder holds it as its tokenizer's chat template, for any tool."""
    train(world.config("sft", tmp_path / "first", "steps=2", "template=chatml"))
    student = f"student.checkpoint={tmp_path / 'first' / 'student'}"
    for template in ("chatml", "tokenizer"):
        train(world.config("sft", tmp_path / template, "steps=2", f"template={template}", student))
    losses = [[entry["loss"] for entry in read_metrics(tmp_path / name)] for name in ("chatml", "tokenizer")]
    assert losses[0] == losses[1]


def test_a_loss_that_is_no_number_stops_with_the_samples(world: World, tmp_path: Path) -> None:
    """Nothing is saved or exported, and the error names the samples of the micro-batch."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in world.student.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(world.student / "model.safetensors")
    name = next(name for name in tensors if name.endswith("multi_modal_projector.linear_2.bias"))
    tensors[name][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    text_only = [f"tiny-{index:04d}" for index in range(3, 24, 4)]
    with pytest.raises(ModelError, match=r"^step 1: the loss is nan on samples tiny-") as caught:
        train(world.config("sft", tmp_path / "run", f"student.checkpoint={broken}", "batch.micro_size=1"))
    assert not any(key in str(caught.value) for key in text_only)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "student").exists()
    assert not (tmp_path / "run" / "summary.json").exists()


def test_held_out_samples_are_evaluated_and_never_trained_on(world: World, tmp_path: Path) -> None:
    settings = ("data.holdout=6", "eval_steps=2", "steps=3", "batch.global_size=18", "batch.micro_size=6")
    summary = train(world.config("sft", tmp_path / "run", *settings))
    assert summary.samples == 18
    log = read_metrics(tmp_path / "run")
    assert ["holdout_loss" in entry for entry in log] == [False, True, True]
    assert log[2]["holdout_loss"] < log[1]["holdout_loss"]
    assert log[0]["positions"] == log[1]["positions"]  # a step is an epoch: the same 18 samples


def test_workers_change_nothing(world: World, tmp_path: Path) -> None:
    losses = []
    for workers in (0, 2):
        train(world.config("mimic_dense", tmp_path / str(workers), f"workers={workers}"))
        losses.append([entry["loss"] for entry in read_metrics(tmp_path / str(workers))])
    assert losses[0] == losses[1]


def test_an_error_in_a_worker_is_one_line(world: World, tmp_path: Path) -> None:
    data = write_tiny_set(tmp_path / "set", 24)
    for row in (0, 1, 2, 4, 5, 6, 8):
        break_image(data, row)
    for workers in (0, 1):
        with pytest.raises(LlavaModError, match=r"cannot be decoded: .*: pack the set again") as caught:
            train(world.config("sft", tmp_path / "run", f"data.set={data}", f"workers={workers}"))
        assert "\n" not in str(caught.value)
