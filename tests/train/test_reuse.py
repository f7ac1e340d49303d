"""One cache for students that differ from the teacher in prompt, image, LM head size or end of turn."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from llavamod_offline.data.encode import template as templates
from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import LlavaModError
from llavamod_offline.families.llava.checkpoint import load_llava, sequence_encoder
from llavamod_offline.families.llava.export import save_llava
from llavamod_offline.models.checkpoint import load_tokenizer
from teacher_cache.read.reader import open_cache
from teacher_cache.student import check
from teacher_cache.write.merge import merge_caches
from tests.tiny import tiny_samples, tiny_text_config, tiny_vision_config, write_image_processor
from tests.train.conftest import EXHAUSTIVE, World, write_cache
from tests.train.reference import Reader, read_metrics
from train.run import train

END, OTHER = "<|im_end|>", "<|endoftext|>"


@pytest.fixture(autouse=True)
def _more_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    """`short`: another wording around the same answers; `im_end`: the same wording, another token at the end."""
    qwen = templates.TEMPLATES["qwen"]
    short = replace(qwen, name="short", system=(), user_prefix=(templates.Segment("Q: "),))
    im_end = replace(qwen, name="im_end", end=END)
    known = {"qwen": qwen, "short": short, "im_end": im_end}
    for module in (templates, check):  # the check of students may be imported before or after
        monkeypatch.setattr(module, "TEMPLATES", known)


def _student_of(folder: Path, *, rows: int = 400, image_size: int = 24, tokenizer: Path) -> Path:
    """A student whose first 400 LM head rows do not depend on how many there are; further rows give large logits."""
    vision = tiny_vision_config()
    vision.image_size = image_size
    config = type(load_llava(tokenizer).config)(
        vision_config=vision,
        text_config=tiny_text_config(rows, tied=False),
        image_token_index=399,
        image_seq_length=(image_size // 8) ** 2,
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = AutoModelForImageTextToText.from_config(config)
        for name, parameter in model.named_parameters():
            torch.manual_seed(len(name))
            table = "embed_tokens" in name or "lm_head" in name
            rows_to_fill = parameter[:400] if table else parameter
            rows_to_fill.copy_(torch.randn_like(rows_to_fill) * (1.0 if table else 0.2))
            if table:
                parameter[400:] = 50.0
    processor = folder.parent / f"{folder.name}-processor"
    processor.mkdir()
    write_image_processor(processor)
    settings = json.loads((processor / "preprocessor_config.json").read_text())
    sides = {"height": image_size, "width": image_size}
    settings |= {"size": {"shortest_edge": image_size}, "crop_size": sides}
    (processor / "preprocessor_config.json").write_text(json.dumps(settings))
    save_llava(model, folder, tokenizer=load_tokenizer(tokenizer), processor_source=processor)
    return folder


def _first_loss(world: World, output: Path, *settings: str) -> float:
    train(world.config("mimic_dense", output, "steps=1", "batch.global_size=24", "batch.micro_size=6", *settings))
    return float(read_metrics(output)[0]["loss"])


def test_spare_head_rows_take_no_part_in_the_loss(world: World, tmp_path: Path) -> None:
    """Students of 400, 416 and 448 rows over 400 ids, as of 151,936 and 152,064 over 151,646: the same loss."""
    losses = []
    for rows in (400, 416, 448):
        student = _student_of(tmp_path / f"rows-{rows}", rows=rows, tokenizer=world.student)
        losses.append(_first_loss(world, tmp_path / str(rows), f"student.checkpoint={student}"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[2] == pytest.approx(losses[0], rel=1e-6)


def test_another_wording_and_resolution_join_a_cache_of_responses(world: World, tmp_path: Path) -> None:
    """The loss is the student's divergence, on its own prompt and image, from the teacher on the teacher's."""
    folder = _student_of(tmp_path / "coarse", image_size=16, tokenizer=world.student)
    found = _first_loss(world, tmp_path / "run", f"student.checkpoint={folder}", "template=short")
    teacher, student = Reader(world.teacher, world.chats), Reader(folder, world.chats)
    student.encoder = sequence_encoder(folder, load_tokenizer(folder), templates.get_template("short"), 2048)
    sample = student.samples.read(0)
    lengths = [len(reader.encoder.encode(sample, "response").input_ids_T) for reader in (student, teacher)]
    assert lengths[0] < lengths[1]
    assert found == pytest.approx(_divergence(teacher, student, torch.arange(400)), rel=1e-5)


@torch.no_grad()
def _divergence(teacher: Reader, student: Reader, order_V: torch.Tensor) -> float:
    """KL(teacher ‖ student) over all samples, the teacher's ids in the given order."""
    parts = []
    for row in range(len(student.samples)):
        sample = student.samples.read(row)
        p_NV = teacher.answer(sample).log_probs_NV[:, order_V]
        parts.append((p_NV.exp() * (p_NV - student.answer(sample).log_probs_NV)).sum(-1))
    return float(torch.cat(parts).mean())


def test_one_declared_token_at_the_end_is_enough(world: World, tmp_path: Path) -> None:
    """A teacher that ends answers with <|im_end|>, a student that ends them with <|endoftext|>."""
    given = (f"data={world.chats}", f"teacher={world.teacher}", f"output={tmp_path / 'cache'}", "template=im_end")
    cache = write_cache(tmp_path / "cache", world.chats, world.teacher, *EXHAUSTIVE, *given)
    settings = (f"cache.path={cache}", f"student.checkpoint={world.student}")
    with pytest.raises(LlavaModError, match=r"words answers as ' ANSWER<\|im_end\|>', the student's 'qwen' as "):
        _first_loss(world, tmp_path / "refused", *settings)
    with pytest.raises(LlavaModError, match="name the teacher's token first"):
        _first_loss(world, tmp_path / "refused", *settings, f"cache.end_of_turn={OTHER}={END}")
    found = _first_loss(world, tmp_path / "run", *settings, f"cache.end_of_turn={END}={OTHER}", "workers=1")
    teacher, student = Reader(world.teacher, world.chats), Reader(world.student, world.chats)
    im_end = templates.get_template("im_end")
    teacher.encoder = sequence_encoder(world.teacher, load_tokenizer(world.teacher), im_end, 2048)
    order_V = torch.arange(400)
    order_V[[396, 398]] = order_V[[398, 396]]
    assert found == pytest.approx(_divergence(teacher, student, order_V), rel=1e-5)
    assert abs(found - _divergence(teacher, student, torch.arange(400))) > 1e-3


def test_a_preference_student_may_declare_its_end_too(world: World, tmp_path: Path) -> None:
    given = (f"data={world.pairs}", f"teacher={world.teacher}", f"output={tmp_path / 'cache'}", "template=im_end")
    cache = write_cache(tmp_path / "cache", world.pairs, world.teacher, *given)
    settings = (f"cache.path={cache}", "steps=1")
    with pytest.raises(LlavaModError, match=r"declare its end of turn as cache\.end_of_turn"):
        train(world.config("preference", tmp_path / "refused", *settings))
    summary = train(world.config("preference", tmp_path / "run", *settings, f"cache.end_of_turn={END}={OTHER}"))
    assert summary.finished


def test_a_field_allowed_by_name_is_passed_over_and_said(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The student has another name for a token that it never uses."""
    student = tmp_path / "student"
    content = json.loads(load_tokenizer(world.student).backend_tokenizer.to_str())
    (unused,) = [entry for entry in content["added_tokens"] if entry["content"] == "<|im_start|>"]
    unused["content"] = "<|extra|>"
    renamed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token=OTHER)
    save_llava(load_llava(world.student), student, tokenizer=renamed, processor_source=world.student)
    settings = f"student.checkpoint={student}"
    with pytest.raises(
        LlavaModError, match=r"tokenizer\.vocabulary: 1 differing: id 397 is '<\|im_start\|>' in the cache"
    ):
        _first_loss(world, tmp_path / "refused", settings)
    with pytest.raises(LlavaModError, match=r"tokenizer\.vocabulary: 1 differing: "):
        _first_loss(world, tmp_path / "refused", settings, "cache.allow=[tokenizer.added_tokens]")
    with caplog.at_level(logging.WARNING):
        loss = _first_loss(
            world, tmp_path / "run", settings, "cache.allow=[tokenizer.added_tokens,tokenizer.vocabulary]"
        )
    assert [r.getMessage().split(": 1 differing")[0] for r in caplog.records if "allowed" in r.getMessage()] == [
        "allowed: tokenizer.vocabulary",
    ]
    assert loss == pytest.approx(_first_loss(world, tmp_path / "same"), rel=1e-6)
    assert len(SampleSet.open(world.chats)) == 24


def test_a_merged_cache_trains_as_one_of_the_union(world: World, tmp_path: Path) -> None:
    """Shards of six samples, so that the teacher sees the same batches either way."""
    samples = tiny_samples(24)
    caches = []
    for name, chosen in (("first", samples[:12]), ("second", samples[12:]), ("union", samples)):
        write_set(chosen, tmp_path / name / "set", shard_samples=6)
        caches.append(write_cache(tmp_path / name / "cache", tmp_path / name / "set", world.teacher))
    merge_caches([open_cache(cache) for cache in caches[:2]], str(tmp_path / "merged"))
    logs: list[list[float]] = []
    for cache in (tmp_path / "merged", caches[2]):
        settings = (f"data.set={tmp_path / 'union/set'}", f"cache.path={cache}", "steps=3")
        train(world.config("mimic_dense", tmp_path / f"run-{len(logs)}", *settings))
        logs.append([float(str(entry["loss"])) for entry in read_metrics(tmp_path / f"run-{len(logs)}")])
    assert logs[0] == logs[1]
    assert len(logs[0]) == 3
