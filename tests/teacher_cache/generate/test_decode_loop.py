"""Batched answers against plain `model.generate` on one unpadded prompt, for every family of teachers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from llavamod_offline.data.encode.template import get_template
from llavamod_offline.data.images import decode_image
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.errors import ModelError
from llavamod_offline.families import open_family
from teacher_cache.engines.hf import HfCaptureEngine
from teacher_cache.format.record import RecordSettings
from teacher_cache.generate.decode_loop import Decoding, Prompt, write_answers
from tests.llavamod_offline.families.official import FAMILIES, LLAVAS, Official, open_official, write_family
from tests.tiny import tiny_image
from tests.tiny_teachers import write_tiny_causal_lm

STEPS = 10
GREEDY = Decoding(0.0, 1.0, STEPS, 0)


def engine_of(folder: Path, *, image_aspect: str = "auto") -> HfCaptureEngine:
    """The engine of a folder, in float32."""
    teacher = open_family(folder, get_template("chatml"), image_aspect=image_aspect, max_length=512)
    vocab_size = len(teacher.encoder.tokenizer)
    settings = RecordSettings(1.0, 1, 0, 1.0, ())
    model = teacher.load(torch.float32)
    return HfCaptureEngine(model, teacher, settings, vocab_size=vocab_size, seed=0, batch_size=8)


def prompts_of(engine: HfCaptureEngine, samples: Sequence[Sample], *, room: int = 99) -> list[Prompt]:
    """The samples' prompts: everything before the answer."""
    made = []
    for sample in samples:
        sequence = engine.teacher.encode(sample, "response")
        ids_T = sequence.input_ids_T[: sequence.supervised_N[0]]
        made.append(Prompt(sample.key, "answer", ids_T, tuple(engine.teacher.images(sample)), room))
    return made


def samples(pictures: bool) -> list[Sample]:
    """Prompts of different lengths with no, one and two images of different sizes."""
    texts = ("Why?", "What colour has the large square on the left of the star? " * 3, "Is there a dog?", "How many?")
    sizes = ((), ((24, 24),), ((60, 31),), ((17, 44), (33, 20)))
    made = []
    for number, (text, own) in enumerate(zip(texts, sizes if pictures else ((),) * 4, strict=True)):
        images = tuple(tiny_image(10 * number + n, size) for n, size in enumerate(own))
        turns = (Turn("user", "<image>\n" * len(images) + text), Turn("assistant", "-"))
        made.append(Sample(f"s-{number}", turns, images, ("png",) * len(images)))
    return made


def settings_of(engine: HfCaptureEngine) -> GenerationConfig:
    """Greedy, until the end token or `STEPS` tokens, excluding the image's id and those beyond the tokenizer."""
    rows = engine.model.get_output_embeddings().weight.shape[0]
    image = [] if engine.teacher.image_token_id is None else [engine.teacher.image_token_id]
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=STEPS,
        eos_token_id=engine.teacher.encoder.end_id,
        pad_token_id=engine.teacher.encoder.end_id,
        suppress_tokens=[*image, *range(engine.vocab_size, rows)] or None,
    )


def official_answer(official: Official, engine: HfCaptureEngine, sample: Sample) -> list[int]:
    """transformers' own answer to the official processor's inputs."""
    text = official.text(sample, "response").rpartition("-")[0]
    images = [decode_image(image, name=sample.key) for image in sample.images]
    inputs = official.processor(text=[text], images=[images] if images else None, return_tensors="pt")
    output = official.model.generate(**inputs, generation_config=settings_of(engine))
    ids: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return ids


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gives_what_transformers_gives_alone(family: str, tmp_path: Path) -> None:
    folder = write_family(family, tmp_path / "teacher")
    engine = engine_of(folder, image_aspect="square" if family in LLAVAS else "auto")
    official = open_official(family, folder)
    asked = samples(pictures=True)
    prompts = prompts_of(engine, asked)
    together = write_answers(engine, prompts, GREEDY)
    assert together == [write_answers(engine, [prompt], GREEDY)[0] for prompt in prompts]
    for sample, answer in zip(asked, together, strict=True):
        expected = official_answer(official, engine, sample)
        end = engine.teacher.encoder.end_id
        assert [*answer.ids, *([end] if answer.ended else [])] == expected, sample.key
    assert len({answer.ids for answer in together}) > 1


@pytest.fixture(scope="module")
def text_engine(tmp_path_factory: pytest.TempPathFactory) -> HfCaptureEngine:
    """The engine of a text-only language model."""
    return engine_of(write_tiny_causal_lm(tmp_path_factory.mktemp("text") / "teacher", "qwen2"))


def test_a_language_model_answers_too(text_engine: HfCaptureEngine, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(text_engine.teacher.folder, dtype=torch.float32).eval()
    prompts = prompts_of(text_engine, samples(pictures=False))
    for prompt, answer in zip(prompts, write_answers(text_engine, prompts, GREEDY), strict=True):
        ids = torch.from_numpy(prompt.input_ids_T)[None]
        output = plain.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings_of(text_engine))
        expected = output[0, ids.shape[1] :].tolist()
        assert list(answer.ids) == [number for number in expected if number != text_engine.teacher.encoder.end_id]


def test_no_answer_holds_the_images_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However likely it is; the next most likely id is chosen instead."""
    engine = engine_of(write_family("llava_llama", tmp_path / "teacher"), image_aspect="square")
    prompts = prompts_of(engine, samples(pictures=True)[:2])
    free = write_answers(engine, prompts, GREEDY)
    image, logits = engine.teacher.image_token_id, engine.lm_head.logits
    assert image is not None

    def eager(rows_RD: torch.Tensor) -> torch.Tensor:
        found = logits(rows_RD).clone()
        found[:, image] = found.amax() + 5
        return found

    monkeypatch.setattr(engine.lm_head, "logits", eager)
    assert write_answers(engine, prompts, GREEDY) == free


def test_samples_depend_on_seed_and_name_alone(text_engine: HfCaptureEngine) -> None:
    prompts = prompts_of(text_engine, samples(pictures=False))
    warm = Decoding(2.0, 0.95, STEPS, 0)
    together = write_answers(text_engine, prompts, warm)
    assert together == [write_answers(text_engine, [prompt], warm)[0] for prompt in prompts]
    assert together == write_answers(text_engine, prompts[::-1], warm)[::-1]
    assert together != write_answers(text_engine, prompts, Decoding(2.0, 0.95, STEPS, 1))
    other = Prompt(prompts[0].key, "answer 3", prompts[0].input_ids_T, (), 99)
    assert write_answers(text_engine, [other], warm) != together[:1]
    nearly_greedy = write_answers(text_engine, prompts, Decoding(1.0, 1e-9, STEPS, 0))
    assert nearly_greedy == write_answers(text_engine, prompts, GREEDY)


def test_an_answer_ends_at_its_room_and_says_so(text_engine: HfCaptureEngine) -> None:
    prompts = prompts_of(text_engine, samples(pictures=False)[:2])
    free = write_answers(text_engine, prompts, GREEDY)
    cut = Prompt(prompts[0].key, "answer", prompts[0].input_ids_T, (), 3)
    found = write_answers(text_engine, [cut, prompts[1]], GREEDY)
    assert found[0].ids == free[0].ids[:3]
    assert not found[0].ended
    assert found[1] == free[1]


def test_logits_that_are_not_finite_spoil_one_answer_only(
    text_engine: HfCaptureEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(text_engine, samples(pictures=False)[:2])
    free = write_answers(text_engine, prompts, GREEDY)
    logits = text_engine.lm_head.logits
    calls: list[int] = []

    def spoilt(rows_RD: torch.Tensor) -> torch.Tensor:
        calls.append(len(rows_RD))
        found = logits(rows_RD).clone()
        if len(calls) == 3:
            found[0, 5] = torch.nan
        return found

    monkeypatch.setattr(text_engine.lm_head, "logits", spoilt)
    found = write_answers(text_engine, prompts, GREEDY)
    assert (found[0].ids, found[0].ended, found[0].finite) == (free[0].ids[:2], False, False)
    assert found[1] == free[1]


def test_a_batch_that_does_not_fit_is_halved(text_engine: HfCaptureEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of(text_engine, samples(pictures=False))
    free = write_answers(text_engine, prompts, GREEDY)
    decoder = type(text_engine.model.get_decoder())
    forward = decoder.forward

    def small(module: Any, *arguments: Any, **settings: Any) -> Any:
        if len(settings["attention_mask"]) > limit:
            raise torch.OutOfMemoryError("no room")
        return forward(module, *arguments, **settings)

    limit = 2
    monkeypatch.setattr(decoder, "forward", small)
    assert write_answers(text_engine, prompts, GREEDY) == free
    limit = 0
    with pytest.raises(ModelError, match=r"sample 's-0': its \d+ tokens and an answer do not fit"):
        write_answers(text_engine, prompts, GREEDY)
