"""A student whose tokenizer puts `<s>` first: distilled, exported, and asked with its own processor's ids."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoProcessor

from eval.engines.hf import HfEngine
from llavamod_offline.data.sample import Turn
from teacher_cache.read.reader import open_cache
from tests.plain import engine_answers, plain_answers, questions
from tests.tiny import write_tiny_llava
from tests.tiny_llama import KINDS, llama_tokenizer
from tests.train.conftest import World, write_cache
from train.run import train


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_has_the_processors_ids(world: World, tmp_path: Path, kind: str) -> None:
    """Training checks each sequence's answers against the teacher's records, whose ids come from its processor."""
    teacher, start = (
        write_tiny_llava(tmp_path / name, seed=seed, template="llava_v1", tokenizer=llama_tokenizer(kind))
        for seed, name in enumerate(("teacher", "start"))
    )
    cache = write_cache(tmp_path / "cache", world.chats, teacher, "capture.positions=all")
    assert open_cache(cache).fingerprint["sequence"]["start_ids"] == [1]
    settings = (f"cache.path={cache}", f"student.checkpoint={start}", "steps=2")
    student = Path(train(world.config("mimic_dense", tmp_path / "run", *settings)).student)
    asked = questions(tmp_path)
    assert plain_answers(student, asked, 8) == engine_answers(student, asked, 8, template="auto")
    processor, engine = AutoProcessor.from_pretrained(student), HfEngine(student)
    turns = [Turn("user", "What?"), Turn("assistant", "A dog."), Turn("user", "Sure?")]
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    ids = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True)
    prompt = engine.encoder.encode_prompt(turns).tolist()
    assert [prompt] == [list(row) for row in ids["input_ids"]] or prompt == list(ids["input_ids"])
    assert prompt.count(1) == 1
