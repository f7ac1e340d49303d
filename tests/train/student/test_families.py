"""Students of families other than LLaVA: from a teacher's cache to an export that plain transformers runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from eval.engines.hf import HfEngine
from llavamod_offline.config import load_config
from llavamod_offline.data.order.stream import Order
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import ConfigError
from llavamod_offline.families.students.parts import model_parts
from teacher_cache.audit.run import audit_cache
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.read.reader import open_cache
from tests.plain import engine_answers, plain_answers, questions
from tests.train.conftest import EXHAUSTIVE, World, write_cache
from tests.train.reference import read_metrics, train_plainly
from tests.train.student.family_world import WRITERS, PlainStudent, plain_processor
from tests.train.test_checkpoint import assert_same_run, train_until_sigterm
from tests.train.test_processes import run_two
from train.run import train

FAST = ("qwen3_vl", "llava_onevision", "smolvlm", "gemma3")
SLOW = (
    *("qwen2_vl", "qwen2_5_vl", "qwen3_5", "idefics3", "internvl", "glm4v", "glm46v", "aya_vision", "llava_next"),
    *("ovis2", "janus", "deepseek_vl", "video_llama_3", "vipllava", "paddleocr_vl", "lighton_ocr"),
)
FAMILIES = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
# The processors of GLM-V and InternVL use a deprecated way of turning tensors into arrays.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
ALL_PARTS = "trainable=[vision,projector,text]"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("students")


def student_of(folders: Path, name: str, seed: int = 0) -> Path:
    """A family's checkpoint, made on first use."""
    folder = folders / f"{name}-{seed}"
    return folder if folder.exists() else WRITERS[name](folder, seed=seed)


def losses(run: Path, name: str = "loss") -> list[float]:
    return [float(entry[name]) for entry in read_metrics(run)]


def assert_answers_alike(student: Path, folder: Path) -> None:
    """`eval-student` and plain transformers must agree, in batches if the processor can make them."""
    asked = questions(folder)
    processor = plain_processor(student)
    alone = plain_answers(student, asked, 8, processor=processor, batch=False)
    assert alone == engine_answers(student, asked, 8, template="auto")


@pytest.mark.parametrize("name", FAMILIES)
def test_from_a_teacher_to_answers(world: World, folders: Path, tmp_path: Path, name: str) -> None:
    """Capture and audit a teacher of the family, distil from its cache, evaluate, and ask with plain transformers."""
    teacher, student = student_of(folders, name, seed=3), student_of(folders, name)
    cache = write_cache(tmp_path / "cache", world.chats, teacher, *EXHAUSTIVE)
    given = (f"data={world.chats}", f"teacher={teacher}", f"output={tmp_path / 'cache'}", *EXHAUSTIVE)
    assert audit_cache(open_cache(cache), load_config(CacheTeacherConfig, (), given)).ok
    settings = (f"cache.path={cache}", f"student.checkpoint={student}", "batch.micro_size=2", "steps=2")
    summary = train(world.config("mimic_dense", tmp_path / "run", *settings, ALL_PARTS))
    exported = Path(summary.student)
    plain = PlainStudent(student)
    teaching = PlainStudent(teacher)
    samples = SampleSet.open(world.chats)
    parts = []
    for row in Order(len(samples), seed=0, batch_size=8).batch(0).tolist():
        with torch.no_grad():
            q_NV, p_NV = (one.log_probs(samples.read(row), "response")[0] for one in (plain, teaching))
        parts.append((p_NV.exp() * (p_NV - q_NV)).sum(-1))
    expected = float(torch.cat(parts).mean())
    assert losses(tmp_path / "run")[0] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    before, after = (AutoModelForImageTextToText.from_pretrained(one).state_dict() for one in (student, exported))
    assert before.keys() == after.keys()
    assert json.loads((exported / "config.json").read_text())["architectures"]
    assert_answers_alike(exported, tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_and_gradients_are_those_of_the_whole_model(
    world: World, folders: Path, tmp_path: Path, name: str
) -> None:
    """Against two AdamW steps on all parts in plain transformers, sample by sample; some samples have no image."""
    student = student_of(folders, name)
    settings = (f"student.checkpoint={student}", "batch.micro_size=2", "steps=2", ALL_PARTS)
    train(world.config("sft", tmp_path / "run", *settings))
    plain, samples = PlainStudent(student), SampleSet.open(world.chats)
    order = Order(len(samples), seed=0, batch_size=8)

    def loss_of_step(step: int) -> Tensor:
        return torch.cat([plain.cross_entropies(samples.read(row)) for row in order.batch(step).tolist()]).mean()

    found, norms = train_plainly(list(plain.model.parameters()), loss_of_step, steps=2, rate=1e-3)
    assert losses(tmp_path / "run") == pytest.approx(found, rel=2e-4)
    assert losses(tmp_path / "run", "grad_norm") == pytest.approx(norms, rel=1e-3)


@pytest.mark.parametrize("name", ["qwen3_vl", pytest.param("smolvlm", marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on(world: World, folders: Path, tmp_path: Path, name: str) -> None:
    settings = (f"student.checkpoint={student_of(folders, name)}", "trainable=[projector,text]")
    train(world.config("sft", tmp_path / "whole", *settings))
    config = world.config("sft", tmp_path / "run", *settings)
    assert train_until_sigterm(config, lines=2) == 2
    train(config)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage", "zero_stage"),
    [
        ("gemma3", "sft", 3),
        ("smolvlm", "sft", 3),
        ("qwen3_vl", "align", 2),
    ],
)
def test_two_processes_equal_one(
    world: World, folders: Path, tmp_path: Path, name: str, stage: str, zero_stage: int
) -> None:
    """In some steps, one process has an image and the other has none."""
    settings = (f"student.checkpoint={student_of(folders, name)}", "steps=6", "batch.micro_size=1")
    done = run_two(
        world.config(stage, tmp_path / "two", *settings), tmp_path, f"engine.zero_stage={zero_stage}", "save_steps=3"
    )
    assert done.returncode == 0, done.stderr
    train(world.config(stage, tmp_path / "one", *settings))
    for key in ("loss", "grad_norm", "positions", "tokens"):
        assert losses(tmp_path / "two", key) == pytest.approx(losses(tmp_path / "one", key), rel=1e-4), key
    two, one = (AutoModelForImageTextToText.from_pretrained(tmp_path / run / "student") for run in ("two", "one"))
    for weight, other in zip(two.state_dict().values(), one.state_dict().values(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3_vl", pytest.param("gemma3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["sigmoid", "kto_pair", "kto"])
def test_preferences(world: World, folders: Path, tmp_path: Path, name: str, kind: str) -> None:
    """A student that is its own reference starts with rewards of 0, then learns to prefer."""
    student = student_of(folders, name)
    cache = write_cache(tmp_path / "cache", world.pairs, student, "capture.preset=reference", "capture.mismatched=true")
    settings = (f"cache.path={cache}", f"student.checkpoint={student}", f"loss.kind={kind}", "loss.distill_weight=0")
    train(world.config("preference", tmp_path / "run", *settings, "batch.micro_size=2", "batch.global_size=24"))
    first, *_, last = read_metrics(tmp_path / "run")
    assert first["preference"] == pytest.approx(math.log(2) if kind == "sigmoid" else 0.5, abs=1e-4)
    assert abs(first["chosen_reward"]["max"]) < 1e-4
    assert last["preference"] < first["preference"]
    assert_answers_alike(tmp_path / "run" / "student", tmp_path)


def test_a_qwen3_vl_becomes_sparse(world: World, folders: Path, tmp_path: Path) -> None:
    """At step 0 its KL from the teacher is the dense student's; the export is the family's own sparse twin."""
    cache = write_cache(tmp_path / "cache", world.chats, student_of(folders, "qwen3_vl", seed=3), *EXHAUSTIVE)
    given = (f"cache.path={cache}", f"student.checkpoint={student_of(folders, 'qwen3_vl')}", "loss.kind=only_kd")
    train(world.config("mimic_dense", tmp_path / "dense", *given, "steps=1"))
    sparse = ("student.capacity_factor=null", "loss.router_aux_coef=0.01")
    summary = train(world.config("mimic_sparse", tmp_path / "sparse", *given, *sparse))
    log = read_metrics(tmp_path / "sparse")
    assert log[0]["divergence"] == pytest.approx(losses(tmp_path / "dense")[0], rel=1e-4)
    assert log[-1]["loss"] < log[0]["loss"]
    assert len(log[-1]["expert_load"]) == 1
    assert summary.activated_parameters < summary.parameters
    model = AutoModelForImageTextToText.from_pretrained(summary.student)
    assert type(model).__name__ == "Qwen3VLMoeForConditionalGeneration"
    assert_answers_alike(Path(summary.student), tmp_path)
    again = (f"student.checkpoint={summary.student}", "student.upcycle=null", "steps=1", "engine.zero_stage=3")
    assert train(world.config("mimic_sparse", tmp_path / "again", *given, *again)).finished


def test_a_student_of_one_family_learns_from_a_teacher_of_another(world: World, folders: Path, tmp_path: Path) -> None:
    """Qwen3-VL teaches Qwen2.5-VL: the same tokenizer, different image tokens."""
    cache = write_cache(
        tmp_path / "cache", world.chats, student_of(folders, "qwen3_vl"), *EXHAUSTIVE, "template=chatml"
    )
    settings = (f"cache.path={cache}", f"student.checkpoint={student_of(folders, 'qwen2_5_vl')}", "steps=3")
    train(world.config("mimic_dense", tmp_path / "run", *settings))
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    engine = HfEngine(tmp_path / "run" / "student", template="auto")
    assert engine.encoder.template.name == "chatml"  # the cache's, which the export states


def test_all_positions_of_a_teacher_with_the_same_images(world: World, folders: Path, tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", world.chats, student_of(folders, "qwen3_vl", 3), "capture.positions=all")
    student = f"student.checkpoint={student_of(folders, 'qwen3_vl')}"
    train(world.config("mimic_dense", tmp_path / "run", student, f"cache.path={cache}", "steps=2"))
    assert losses(tmp_path / "run", "positions")[0] == losses(tmp_path / "run", "tokens")[0]


ADAPTED = (
    *("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_5", "gemma3", "internvl", "idefics3", "smolvlm"),
    *("glm4v", "glm46v", "aya_vision", "llava_next", "ovis2", "deepseek_vl", "video_llama_3", "vipllava"),
    *("paddleocr_vl", "lighton_ocr", "janus"),
)
LANGUAGE_ONLY, ALL_LINEAR = "[attention,mlp]", "[vision,projector,text]"


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        *(("qwen3_vl", targets) for targets in (LANGUAGE_ONLY, ALL_LINEAR)),
        *(pytest.param(name, ALL_LINEAR, marks=pytest.mark.slow) for name in ADAPTED),
        *(pytest.param(name, LANGUAGE_ONLY, marks=pytest.mark.slow) for name in ("gemma3", "ovis2")),
    ],
)
def test_adapters(world: World, folders: Path, tmp_path: Path, name: str, targets: str) -> None:
    """They are added to each part named, and merged into an export with the checkpoint's tensors."""
    if name in ("gemma3", "ovis2"):  # their projectors are not linear layers
        targets = targets.replace("projector,", "")
    student = student_of(folders, name)
    trainable = "[projector]" if targets == LANGUAGE_ONLY else "[]"
    lora = (f"student.lora.targets={targets}", "student.lora.rank=4", "student.lora.dropout=0")
    settings = (f"student.checkpoint={student}", *lora, f"trainable={trainable}", "optim.lr=1e-2", "batch.micro_size=2")
    summary = train(world.config("sft", tmp_path / "run", *settings))
    before, after = (
        AutoModelForImageTextToText.from_pretrained(one).state_dict() for one in (student, summary.student)
    )
    assert before.keys() == after.keys()
    changed = {one for one in before if not torch.equal(before[one], after[one])}
    patterns = model_parts(AutoModelForImageTextToText.from_pretrained(student))
    changes_projector = "projector" in targets or "projector" in trainable
    for part, is_changed in {"vision": "vision" in targets, "projector": changes_projector, "attention": True}.items():
        assert any(patterns[part].search(one) for one in changed) == is_changed, part
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3"])
def test_kept_adapters_with_a_projector_trained_in_full(world: World, folders: Path, tmp_path: Path, name: str) -> None:
    """PEFT saves whole modules: Gemma's projector has a parameter of its own, beside a module."""
    settings = (f"student.checkpoint={student_of(folders, name)}", "student.lora.keep_adapters=true", "optim.lr=1e-2")
    lora = ("student.lora.rank=4", "student.lora.dropout=0", "trainable=[projector]", "batch.micro_size=2", "steps=2")
    student = Path(train(world.config("sft", tmp_path / "run", *settings, *lora)).student)
    base = AutoModelForImageTextToText.from_pretrained(student_of(folders, name))
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapters").merge_and_unload().state_dict()
    expected = AutoModelForImageTextToText.from_pretrained(student).state_dict()
    for one, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[one.replace(".modules_to_save.default", "")], rtol=1e-5, atol=1e-5)


def test_adapters_that_peft_could_not_load_are_refused_before_the_first_step(
    world: World, folders: Path, tmp_path: Path
) -> None:
    """The newline embedding of LLaVA-OneVision belongs to the module that holds everything else."""
    settings = (f"student.checkpoint={student_of(folders, 'llava_onevision')}", "student.lora.keep_adapters=true")
    with pytest.raises(ConfigError, match=r"keep_adapters: PEFT saves whole modules, but 'model\.image_newline' is"):
        train(world.config("sft", tmp_path / "run", *settings, "trainable=[projector]", "batch.micro_size=2"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["qwen3_vl_moe", pytest.param("qwen3_5_moe", marks=pytest.mark.slow)])
def test_a_sparse_checkpoint_is_trained_on(world: World, folders: Path, tmp_path: Path, name: str) -> None:
    cache = write_cache(tmp_path / "cache", world.chats, student_of(folders, name, seed=3), *EXHAUSTIVE)
    settings = (f"cache.path={cache}", f"student.checkpoint={student_of(folders, name)}", "student.upcycle=null")
    summary = train(world.config("mimic_sparse", tmp_path / "run", *settings, "loss.kind=only_kd"))
    log = read_metrics(tmp_path / "run")
    assert len(log[-1]["expert_load"]) == 2
    assert log[-1]["divergence"] < log[0]["divergence"]
    assert summary.activated_parameters < summary.parameters
    assert_answers_alike(Path(summary.student), tmp_path)


def test_batches_by_modality_and_by_length(world: World, folders: Path, tmp_path: Path) -> None:
    """Lengths are in tokens, which depend on image sizes."""
    settings: tuple[Any, ...] = (f"student.checkpoint={student_of(folders, 'qwen3_vl')}", "steps=3")
    grouped = ("data.group_by_length=true", "data.group_by_modality=true")
    assert train(world.config("sft", tmp_path / "run", *settings, *grouped, "workers=2")).finished
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["contents"]["order"]["by_tokens"] is True
