"""A student whose tokenizer is not its teacher's, trained on the teacher's cache, against a slow dense loop."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from tokenizers.normalizers import Lowercase
from transformers import PreTrainedTokenizerFast

from llavamod_offline.config import load_config
from llavamod_offline.errors import CacheError, ConfigError, TargetError
from llavamod_offline.models.checkpoint import load_tokenizer
from teacher_cache.fingerprint import added_tokens
from teacher_cache.other_tokenizer.bridge import TokenizerBridge
from teacher_cache.other_tokenizer.token_bytes import TokenBytes, token_bytes
from teacher_cache.student.token_list import Tokens
from tests.teacher_cache.other_tokenizer.dense import span_terms
from tests.tiny import tiny_tokenizer, write_tiny_llava
from tests.tiny_llama import llama_tokenizer
from tests.train.conftest import EXHAUSTIVE, World, write_cache
from tests.train.reference import Answer, Reader, read_metrics, train_plainly
from train.config import MeasureConfig
from train.run import train

ALIGN = ("cache.other_tokenizer=align", "template=auto")


@pytest.fixture(scope="module")
def students(world: World) -> dict[str, Path]:
    """Students by template: one with a smaller byte-level tokenizer and another end of turn, and a Llama-like one."""
    return {
        "chatml": write_tiny_llava(world.root / "other-bpe", tokenizer=tiny_tokenizer(320), template="chatml"),
        "llava_v1": write_tiny_llava(world.root / "llama", tokenizer=llama_tokenizer(), template="llava_v1"),
    }


def _bytes(folder: Path) -> TokenBytes:
    tokenizer = load_tokenizer(folder)
    tokens = Tokens.of(tokenizer.get_vocab(), added_tokens(tokenizer))
    return token_bytes(tokens, size=len(tokenizer), whose="the student's")


def live(
    world: World, folder: Path, template: str, *, unmatched_weight: float, lm_weight: float
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms with the teacher in memory, span by span."""
    student, teacher = Reader(folder, world.chats, template), Reader(world.teacher, world.chats)
    ends = (teacher.encoder.end_id, student.encoder.end_id)
    bridge = TokenizerBridge.of(_bytes(world.teacher), _bytes(folder), ends)

    def of_sample(answer: Answer, said: Answer, key: str) -> torch.Tensor:
        ids = (said.target_ids_N.tolist(), answer.target_ids_N.tolist())
        total = -lm_weight * answer.target_log_probs_N.sum().double()
        sequence = next(s for s in sequences if s.key == key)
        for span in bridge.spans(said.target_ids_N.numpy(), sequence):
            value, distance = span_terms(
                bridge,
                span,
                teacher_NW=said.log_probs_NV.double(),
                student_MV=answer.log_probs_NV.double(),
                ids=ids,
            )
            total = total + value + unmatched_weight * distance
        return total

    sequences = [student.encoder.encode(student.samples.read(row), "response") for row in range(24)]

    def loss_of_step(step: int) -> torch.Tensor:
        total, tokens = torch.zeros((), dtype=torch.float64), 0
        for sample in student.step_samples(step, 8):
            with torch.no_grad():
                said = teacher.answer(sample)
            answer = student.answer(sample)
            total, tokens = total + of_sample(answer, said, sample.key), tokens + len(answer.target_ids_N)
        return total / tokens

    trained = student.freeze_all_but("language_model", "multi_modal_projector", "lm_head")
    return train_plainly(trained, loss_of_step, steps=2, rate=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "settings", "unmatched_weight", "lm_weight"),
    [
        ("chatml", (), 1.0, 0.0),
        ("llava_v1", ("loss.unmatched_weight=0.3", "loss.kind=kd_lm", "loss.lm_weight=0.5"), 0.3, 0.5),
    ],
)
def test_training_equals_a_loop_with_the_teacher_in_memory(
    world: World,
    students: dict[str, Path],
    tmp_path: Path,
    template: str,
    settings: tuple[str, ...],
    unmatched_weight: float,
    lm_weight: float,
) -> None:
    folder = students[template]
    train(world.config("mimic_dense", tmp_path, f"student.checkpoint={folder}", "steps=2", *ALIGN, *settings))
    logged = read_metrics(tmp_path)
    losses, norms = live(world, folder, template, unmatched_weight=unmatched_weight, lm_weight=lm_weight)
    assert [line["loss"] for line in logged] == pytest.approx(losses, rel=1e-3)
    assert [line["grad_norm"] for line in logged] == pytest.approx(norms, rel=1e-2)  # AdamW amplifies rounding
    assert all(0 < line["spans"] <= 1 for line in logged)


def test_a_cache_of_all_positions_gives_the_same_loss(world: World, students: dict[str, Path], tmp_path: Path) -> None:
    everything = write_cache(tmp_path / "all", world.chats, world.teacher, *EXHAUSTIVE, "capture.positions=all")
    given = (f"student.checkpoint={students['chatml']}", "steps=1", *ALIGN)
    for name, cache in (("all", everything), ("response", world.chats_cache)):
        train(world.config("mimic_dense", tmp_path / f"run-{name}", *given, f"cache.path={cache}"))
    losses = [read_metrics(tmp_path / f"run-{name}")[0]["loss"] for name in ("all", "response")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_another_tokenizer_is_refused_unless_it_is_to_be_aligned(
    world: World, students: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(CacheError, match=r"does not fit this student.*cache\.other_tokenizer=align"):
        train(world.config("mimic_dense", tmp_path, f"student.checkpoint={students['chatml']}"))


def test_one_tokenizer_is_not_aligned(world: World, tmp_path: Path) -> None:
    for name, settings in (("plain", ()), ("align", ("cache.other_tokenizer=align",))):
        train(world.config("mimic_dense", tmp_path / name, "steps=1", *settings))
    assert "spans" not in read_metrics(tmp_path / "align")[0]
    assert read_metrics(tmp_path / "align")[0]["loss"] == read_metrics(tmp_path / "plain")[0]["loss"]


def _lowering() -> PreTrainedTokenizerFast:
    """A tokenizer that does not preserve its text."""
    made = tiny_tokenizer(320)
    made.backend_tokenizer.normalizer = Lowercase()
    return made


def test_an_answer_that_says_something_else_is_named(world: World, students: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "lowering"
    write_tiny_llava(folder, tokenizer=_lowering(), template="chatml")
    with pytest.raises(TargetError, match=r"sample '.*' \(response\): from character \d+ on, the teacher's"):
        train(world.config("mimic_dense", tmp_path / "run", f"student.checkpoint={folder}", *ALIGN))


def test_a_cache_that_does_not_tell_tokens_is_refused(
    world: World, students: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import teacher_cache.read.reader as reader

    opened = reader.open_cache

    def older(*args: object, **settings: object) -> reader.TeacherCache:
        cache = opened(*args, **settings)  # type: ignore[arg-type]
        cache.fingerprint = json.loads(json.dumps(cache.fingerprint))
        del cache.fingerprint["tokenizer"]["tokens"]
        return cache

    monkeypatch.setattr(reader, "open_cache", older)
    with pytest.raises(ConfigError, match="does not list its teacher's tokens: capture again"):
        train(world.config("mimic_dense", tmp_path, f"student.checkpoint={students['chatml']}", *ALIGN))


@pytest.mark.parametrize(
    ("stage", "settings", "named"),
    [
        ("mimic_dense", ("loss.temperature=2",), "loss.temperature is 2"),
        ("mimic_dense", ("loss.tail=samples",), "loss.tail"),
        ("mimic_dense", ("loss.kind=policy_gradient",), "cache.other_tokenizer"),
        ("mimic_dense", ("loss.positions=written",), "cache.other_tokenizer"),
        ("mimic_dense", ("loss.align.feature_weight=1",), "loss.align"),
        ("mimic_dense", ("cache.end_of_turn=<|im_end|>=<|endoftext|>",), "cache.end_of_turn"),
        ("mimic_dense", ("loss.unmatched_weight=-1",), "loss.unmatched_weight is -1"),
        ("preference", (), "cache.other_tokenizer: only the mimic stages align tokens, not preference"),
    ],
)
def test_settings_that_do_not_suit_are_named(
    world: World, tmp_path: Path, stage: str, settings: tuple[str, ...], named: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        world.config(stage, tmp_path, "cache.other_tokenizer=align", *settings)


def test_settings_of_aligned_tokens_need_it(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"loss\.unmatched_weight: not used with one tokenizer"):
        world.config("mimic_dense", tmp_path, "loss.unmatched_weight=0")
    with pytest.raises(ConfigError, match=r"cache\.other_tokenizer: the distance"):
        load_config(
            MeasureConfig,
            (),
            ["student.checkpoint=a", "data.set=b", "cache.path=c", "cache.other_tokenizer=align"],
        )
