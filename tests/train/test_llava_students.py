"""Students over many language models and vision towers, through all stages, into plain transformers and evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from llavamod_offline.errors import ModelError
from llavamod_offline.families.llava.building import build_llava
from llavamod_offline.families.llava.checkpoint import image_tokens, load_llava
from tests.plain import engine_answers, plain_answers, questions
from tests.tiny_students import REFUSED_TEXT_MODELS, TEXT_MODELS, TOWERS, write_language_model, write_tower
from tests.train.conftest import World
from tests.train.reference import read_metrics
from tests.train.test_checkpoint import assert_same_run, train_until_sigterm
from train.run import train

PAIRS = [*((text, "CLIP") for text in TEXT_MODELS), *(("Llama", tower) for tower in TOWERS[1:]), ("Gemma3", "SigLIP2")]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    for name in TEXT_MODELS:
        write_language_model(folder / name, name)
    for name in TOWERS:
        write_tower(folder / name, name)
    return folder


@pytest.mark.parametrize(("text", "tower"), PAIRS)
def test_a_student_starts_as_its_parts_are(parts: Path, text: str, tower: str) -> None:
    model = build_llava(parts / tower, parts / text, seed=0)
    assert image_tokens(model.config) == 9
    plain = AutoModelForCausalLM.from_pretrained(parts / text)
    input_ids = torch.arange(40).reshape(2, 20)
    rows = plain.config.vocab_size
    with torch.no_grad():
        logits = plain(input_ids=input_ids).logits
        torch.testing.assert_close(model(input_ids=input_ids).logits[..., :rows], logits, rtol=1e-5, atol=1e-5)
    assert logits.std() > 0.05


@pytest.mark.parametrize(
    ("text", "tower"),
    [pair if pair == ("Llama", "SigLIP") else pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS],
)
def test_every_stage_and_the_evaluation(world: World, parts: Path, tmp_path: Path, text: str, tower: str) -> None:
    """From parts, through all stages; plain transformers loads each export, and its answers equal our evaluation's."""
    built = (f"student.vision_tower={parts / tower}", f"student.language_model={parts / text}")
    student, start = tmp_path, [*built, "student.checkpoint=null"]
    for stage in ("align", "mimic_dense", "preference"):
        train(world.config(stage, tmp_path / stage, *start, "steps=2"))
        student = tmp_path / stage / "student"
        start = [f"student.checkpoint={student}"]
        log = read_metrics(tmp_path / stage)
        assert all(entry["grad_norm"] > 0 for entry in log), stage
        plain, own = AutoModelForImageTextToText.from_pretrained(student), load_llava(student)
        for name, tensor in own.state_dict().items():
            assert torch.equal(plain.state_dict()[name], tensor), name
    asked = questions(tmp_path)
    assert plain_answers(student, asked, 8) == engine_answers(student, asked, 8, template="auto")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # Qwen2's shared expert of size 0
@pytest.mark.parametrize("text", ["Qwen2", "Qwen3", "Llama", "Mistral", "OLMo2"])
def test_a_student_made_sparse_is_trained_and_evaluated(world: World, parts: Path, tmp_path: Path, text: str) -> None:
    built = (f"student.vision_tower={parts / 'SigLIP'}", f"student.language_model={parts / text}")
    train(world.config("align", tmp_path / "align", *built, "student.checkpoint=null", "steps=2"))
    settings = (f"student.checkpoint={tmp_path / 'align' / 'student'}", "student.upcycle.layers=dense", "steps=3")
    train(world.config("mimic_sparse", tmp_path / "sparse", *settings, "engine.zero_stage=2"))
    student, log = tmp_path / "sparse" / "student", read_metrics(tmp_path / "sparse")
    assert len(log[-1]["expert_load"]) == 2
    asked = questions(tmp_path)
    assert plain_answers(student, asked, 8) == engine_answers(student, asked, 8, template="auto")


@pytest.mark.slow
@pytest.mark.parametrize("text", ["Gemma", "Gemma3", "Phi3", "OLMo2"])
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_any_zero_stage_gives_the_same_losses(
    world: World, parts: Path, tmp_path: Path, text: str, zero_stage: int
) -> None:
    """Gemma's embedding scale is not a parameter, so no checkpoint contains it."""
    built = (f"student.vision_tower={parts / 'SigLIP'}", f"student.language_model={parts / text}")
    chosen = ("student.checkpoint=null", "trainable=[projector,text,vision]", "engine.gradient_checkpointing=true")
    for name, stage in (("plain", 0), ("zero", zero_stage)):
        train(world.config("align", tmp_path / name, *built, *chosen, f"engine.zero_stage={stage}"))
    plain, zero = ([entry["loss"] for entry in read_metrics(tmp_path / name)] for name in ("plain", "zero"))
    assert zero == pytest.approx(plain, rel=1e-5)
    assert plain[-1] < plain[0]


def test_a_stopped_run_over_a_gemma_goes_on(world: World, parts: Path, tmp_path: Path) -> None:
    """Its embeddings have a scale that no checkpoint contains."""
    built = (f"student.vision_tower={parts / 'SigLIP'}", f"student.language_model={parts / 'Gemma'}")
    settings = (*built, "student.checkpoint=null", "trainable=[projector,text]")
    train(world.config("align", tmp_path / "whole", *settings))
    train_until_sigterm(world.config("align", tmp_path / "run", *settings), lines=2)
    train(world.config("align", tmp_path / "run", *settings))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Phi2", "over a 'phi' would lose the bias of its LM head: use another language model"),
        ("Gemma2", "over a 'gemma2' would lose the soft cap of its logits, 30: use another"),
        ("Cohere", "over a 'cohere' would lose the scale of its logits, 0.0625"),
        ("Granite", "over a 'granite' would lose the scale of its logits, 0.125"),
        ("BART", "embeddings cannot be reached|an encoder-decoder: use the folder of a decoder-only model"),
        ("Mixtral", "the language model is a mixture of experts: use a dense one"),
        ("Falcon-H1", "over a 'falcon_h1' would lose the scale of its logits, 0.5"),
    ],
)
def test_language_models_of_which_a_part_would_be_lost_are_refused(
    world: World, parts: Path, tmp_path: Path, name: str, reason: str
) -> None:
    assert name in REFUSED_TEXT_MODELS
    text = write_language_model(tmp_path / "text", name)
    settings = (f"student.vision_tower={parts / 'CLIP'}", f"student.language_model={text}", "student.checkpoint=null")
    with pytest.raises(ModelError, match=reason) as caught:
        train(world.config("align", tmp_path / "run", *settings))
    assert str(text) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
