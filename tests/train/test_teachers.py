"""A LLaVA student of a teacher from another family: other pixels, other image tokens, one vocabulary."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config

from llavamod_offline.data.encode import template as templates
from llavamod_offline.data.sample import Sample
from llavamod_offline.errors import LlavaModError
from llavamod_offline.families.llava.building import build_llava, build_tokenizer
from llavamod_offline.families.llava.checkpoint import load_llava, sequence_encoder
from llavamod_offline.families.llava.export import save_llava
from llavamod_offline.models.checkpoint import load_tokenizer
from teacher_cache.read.reader import open_cache
from tests.llavamod_offline.families.official import Official, open_official
from tests.tiny import write_tiny_llava, write_tiny_tower
from tests.tiny_families import TINY_FAMILIES
from tests.tiny_teachers import QWEN_VL_TOKENS, write_tiny_causal_lm, write_tiny_onevision, write_tiny_qwen_vl
from tests.train.conftest import EXHAUSTIVE, World, write_cache
from tests.train.reference import Reader, read_metrics
from train.run import train


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen_vl(tmp_path_factory.mktemp("teacher") / "qwen2.5-vl")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as stage `align` builds it: a CLIP tower and a Qwen2.5 with the teacher's tokenizer plus `<image>`."""
    folder = tmp_path_factory.mktemp("student")
    tower = write_tiny_tower(folder / "tower")
    language_model = write_tiny_causal_lm(folder / "qwen2.5", special=QWEN_VL_TOKENS)
    tokenizer = build_tokenizer(language_model)
    model = build_llava(tower, language_model, seed=0)
    save_llava(model, folder / "student", tokenizer=tokenizer, processor_source=tower)
    return folder / "student"


def _divergence(world: World, official: Official, student: Path, template: str, order_V: torch.Tensor) -> float:
    """KL(teacher ‖ student) over all samples, the teacher with its own processor, its ids in the given order."""
    reader = Reader(student, world.chats)
    reader.encoder = sequence_encoder(student, load_tokenizer(student), templates.get_template(template), 2048)
    reader.vocab = len(order_V)
    parts = []
    for row in range(len(reader.samples)):
        sample: Sample = reader.samples.read(row)
        with torch.no_grad():
            answer = reader.answer(sample)
        ids_T, logits_TV = official.log_probs([(sample, "response")])[0]
        supervised_N = _answers(ids_T, load_tokenizer(official.folder), sample)
        p_NV = logits_TV[supervised_N - 1][:, order_V].log_softmax(-1)
        parts.append((p_NV.exp() * (p_NV - answer.log_probs_NV)).sum(-1))
    return float(torch.cat(parts).mean())


def _answers(ids_T: np.ndarray, tokenizer: PreTrainedTokenizerFast, sample: Sample) -> np.ndarray:
    """The indices of the assistant's tokens and their ends: every turn ends with <|im_end|>, the system's first."""
    ends = np.flatnonzero(ids_T == tokenizer.convert_tokens_to_ids("<|im_end|>"))
    between = len(tokenizer("<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
    answers = range(1, len(sample.turns), 2)
    return np.concatenate([np.arange(ends[number] + between, ends[number + 1] + 1) for number in answers])


def test_a_llava_student_learns_from_a_qwen_vl_teacher(
    world: World, teacher: Path, student: Path, tmp_path: Path
) -> None:
    cache = write_cache(tmp_path / "cache", world.chats, teacher, *EXHAUSTIVE, "template=chatml")
    settings = (f"cache.path={cache}", f"student.checkpoint={student}", "template=chatml", "batch.global_size=24")
    summary = train(world.config("mimic_dense", tmp_path / "run", *settings, "batch.micro_size=6", "steps=2"))
    assert summary.finished
    losses = [float(str(entry["loss"])) for entry in read_metrics(tmp_path / "run")]
    assert losses[1] < losses[0]
    official = open_official("qwen2_5_vl", teacher)
    assert losses[0] == pytest.approx(_divergence(world, official, student, "chatml", torch.arange(404)), rel=1e-4)


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_5"])
def test_one_cache_serves_a_llava_student_of_another_family_with_the_same_tokenizer(
    world: World, student: Path, tmp_path: Path, name: str
) -> None:
    teacher = TINY_FAMILIES[name].write(tmp_path / "teacher")
    cache = write_cache(tmp_path / "cache", world.chats, teacher, *EXHAUSTIVE, "template=chatml")
    settings = (f"cache.path={cache}", f"student.checkpoint={student}", "template=chatml", "batch.global_size=24")
    assert train(world.config("mimic_dense", tmp_path / "run", *settings, "batch.micro_size=6", "steps=3")).finished
    losses = [float(str(entry["loss"])) for entry in read_metrics(tmp_path / "run")]
    assert losses[2] < losses[0]


def test_its_end_of_turn_may_be_declared(
    world: World, teacher: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base model that ends answers with <|endoftext|>."""
    chatml = templates.TEMPLATES["chatml"]
    monkeypatch.setitem(templates.TEMPLATES, "base", replace(chatml, name="base", end="<|endoftext|>"))
    cache = write_cache(tmp_path / "cache", world.chats, teacher, *EXHAUSTIVE, "template=chatml")
    settings = (f"cache.path={cache}", f"student.checkpoint={student}", "template=base", "steps=1")
    sizes = ("batch.global_size=24", "batch.micro_size=6")
    with pytest.raises(LlavaModError, match="declare its end of turn as cache"):
        train(world.config("mimic_dense", tmp_path / "refused", *settings, *sizes))
    declared = "cache.end_of_turn=<|im_end|>=<|endoftext|>"
    train(world.config("mimic_dense", tmp_path / "run", *settings, *sizes, declared))
    tokenizer = load_tokenizer(student)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    order_V = torch.arange(404)
    order_V[ends] = order_V[ends[::-1]]
    found = float(str(read_metrics(tmp_path / "run")[0]["loss"]))
    expected = _divergence(world, open_official("qwen2_5_vl", teacher), student, "base", order_V)
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_student_whose_tokens_are_others_must_say_so(
    world: World, teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A Qwen2 with fewer special tokens, so that its `<image>` has the id of the teacher's <|vision_start|>."""
    cache = write_cache(tmp_path / "cache", world.chats, teacher, *EXHAUSTIVE, "template=chatml")
    student = write_tiny_llava(tmp_path / "student", head_rows=448)
    settings = (f"cache.path={cache}", f"student.checkpoint={student}", "template=chatml", "steps=1")
    with pytest.raises(
        LlavaModError,
        match=r"tokenizer\.vocabulary: \d+ differing: id \d+ is '.+' in the cache, '.+' in the student.*allow ",
    ):
        train(world.config("mimic_dense", tmp_path / "refused", *settings))
    allowed = "cache.allow=[tokenizer.added_tokens,tokenizer.vocabulary]"
    assert train(world.config("mimic_dense", tmp_path / "run", *settings, allowed)).finished


def test_a_cache_of_all_positions_is_for_students_with_the_same_image_tokens(
    world: World, teacher: Path, student: Path, tmp_path: Path
) -> None:
    cache = write_cache(tmp_path / "cache", world.chats, teacher, "template=chatml", "capture.positions=all")
    settings = (f"cache.path={cache}", f"student.checkpoint={student}", "template=chatml")
    with pytest.raises(
        LlavaModError,
        match=r"images\.token_id: cache 402, student 404; images\.tokens: cache by size, student 9: it has",
    ):
        train(world.config("mimic_dense", tmp_path / "refused", *settings))


def test_qwen3_teaches_qwen3_dense_and_sparse(world: World, tmp_path: Path) -> None:
    """Normalised queries and keys, wide attention heads; the sparse student also under ZeRO-3."""
    teacher = write_tiny_llava(tmp_path / "teacher", hidden=48, layers=3, seed=7, text_config=Qwen3Config)
    student = write_tiny_llava(tmp_path / "student", text_config=Qwen3Config)
    cache = write_cache(tmp_path / "cache", world.chats, teacher, *EXHAUSTIVE)
    settings = (f"cache.path={cache}", f"student.checkpoint={student}", "batch.global_size=24", "batch.micro_size=6")
    train(world.config("mimic_dense", tmp_path / "dense", *settings, "steps=1"))
    readers = [Reader(folder, world.chats) for folder in (teacher, student)]
    parts = []
    for row in range(24):
        sample = readers[0].samples.read(row)
        with torch.no_grad():
            p_NV, q_NV = (reader.answer(sample).log_probs_NV for reader in readers)
        parts.append((p_NV.exp() * (p_NV - q_NV)).sum(-1))
    assert read_metrics(tmp_path / "dense")[0]["loss"] == pytest.approx(float(torch.cat(parts).mean()), rel=1e-5)
    losses = []
    for name, more in (("sparse", ()), ("zero3", ("engine.zero_stage=3",))):
        summary = train(world.config("mimic_sparse", tmp_path / name, *settings, *more, "steps=3"))
        assert summary.activated_parameters < summary.parameters
        assert load_llava(Path(summary.student)).config.text_config.model_type == "qwen3_moe"
        losses.append([entry["loss"] for entry in read_metrics(tmp_path / name)])
    assert losses[0][2] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("spare", [0, 5])
def test_onevisions_extra_token_at_the_end_is_no_difference(world: World, tmp_path: Path, spare: int) -> None:
    """The student lacks `<video>`, with and without a row of its LM head at that id: V is the smaller of both."""
    teacher = write_tiny_onevision(tmp_path / "teacher")
    cache = write_cache(tmp_path / "cache", world.chats, teacher, *EXHAUSTIVE, "template=chatml")
    assert open_cache(cache).vocab_size == 401
    student = write_tiny_llava(tmp_path / "student", template="chatml", head_rows=400 + spare)
    found = train(world.config("mimic_dense", tmp_path / "run", f"cache.path={cache}", f"student.checkpoint={student}"))
    assert found.finished
