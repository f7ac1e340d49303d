"""Questions to checkpoints of families other than LLaVA's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, GenerationConfig

from eval.engines.hf import HfEngine
from eval.engines.prompts import asked_sample, never_answers, prompt_sequence
from eval.example import Example
from eval.files import FileImage
from tests.tiny import tiny_image
from tests.tiny_families import TINY_FAMILIES
from tests.tiny_teachers import write_tiny_causal_lm


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "smolvlm", "internvl"])
def test_a_batch_of_questions_is_answered_as_each_alone_by_plain_transformers(tmp_path: Path, name: str) -> None:
    folder = TINY_FAMILIES[name].write(tmp_path / "model")
    examples = []
    for number, size in enumerate(((40, 30), (30, 70), (64, 64))):
        (tmp_path / f"{number}.png").write_bytes(tiny_image(number, size))
        source = FileImage(tmp_path, (f"{number}.png",))
        examples.append(Example(str(number), f"Which colour? {number}", None, f"{number}.png", source))
    examples.append(Example("3", "How many?", None))
    engine = HfEngine(folder, device="cpu")
    found = engine.answer(examples, 8)
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    end = engine.encoder.end_id
    settings = GenerationConfig(
        max_new_tokens=8, eos_token_id=end, pad_token_id=end, suppress_tokens=never_answers(engine.family)
    )
    for example, answer in zip(examples, found, strict=True):
        sample = asked_sample(example)
        prompt = prompt_sequence(engine.family, sample, 8)
        inputs = engine.family.model_inputs([prompt], [engine.family.images(sample)])
        ids = plain.generate(**inputs, generation_config=settings)[0, len(prompt.input_ids_T) :].tolist()
        ids = ids[: ids.index(end)] if end in ids else ids
        text = engine.encoder.tokenizer.decode(ids, skip_special_tokens=True)
        assert (answer.text, answer.n_tokens) == (text.strip(), len(ids))
    assert len({answer.text for answer in found}) > 1 or name == "gemma3"  # gemma3's answers are all special tokens


def test_decoding_is_greedy_whatever_the_folder_recommends(tmp_path: Path) -> None:
    """Such as Qwen2.5-VL's, whose generation_config.json penalises repetitions; its digest shows a change."""
    folder = write_tiny_causal_lm(tmp_path / "model", "qwen2")
    examples = [Example(str(number), f"Which colour? {number}", None) for number in range(3)]
    engine = HfEngine(folder, template="chatml", device="cpu")
    before, described = engine.answer(examples, 16), engine.describe()
    recommended = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 12, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(recommended))
    engine = HfEngine(folder, template="chatml", device="cpu")
    assert engine.answer(examples, 16) == before
    assert engine.describe()["model_sha256"] != described["model_sha256"]


def test_the_end_of_a_vocabulary_with_gaps_may_be_answered(tmp_path: Path) -> None:
    folder = write_tiny_causal_lm(tmp_path / "model", "qwen2")
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary, added = content["model"]["vocab"], content["added_tokens"]
    last = max([*vocabulary.values(), *(token["id"] for token in added)]) + 5
    for token in added:
        token["id"] = last if token["content"] == "<|im_end|>" else token["id"]
    vocabulary["<|im_end|>"] = last
    (folder / "tokenizer.json").write_text(json.dumps(content))
    family = HfEngine(folder, template="chatml", device="cpu").family
    assert family.encoder.end_id == last < family.head_rows
    assert last not in never_answers(family)
    assert never_answers(family)[-1] == family.head_rows - 1
