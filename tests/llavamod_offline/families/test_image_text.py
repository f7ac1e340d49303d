"""Families that use their own processors: captures equal what a plain processor and the whole model give."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from llavamod_offline.data.encode.tokenize import TokenizedSequence
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.families import Family, open_family
from teacher_cache.engines.hf import HfCaptureEngine
from teacher_cache.engines.protocol import Request
from teacher_cache.format.record import RecordSettings
from teacher_cache.format.sequences import SequenceRecord
from teacher_cache.generate.decode_loop import Decoding, Prompt, write_answers
from tests.llavamod_offline.families.plain_processor import PlainProcessor, open_plain
from tests.tiny import tiny_image
from tests.tiny_families import NEED_TORCHVISION, TINY_FAMILIES
from tests.tiny_llama import KINDS, llama_tokenizer

SIZES = ((24, 24), (60, 31), (17, 44), (150, 40), (33, 100))
# From how transformers' own processors convert arrays and tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
_MISSING = importlib.util.find_spec("torchvision") is None
_SKIP = pytest.mark.skipif(_MISSING, reason="its processor needs torchvision")
NAMES = [pytest.param(name, marks=[_SKIP] if name in NEED_TORCHVISION else []) for name in TINY_FAMILIES]


@dataclass(frozen=True)
class World:
    name: str
    folder: Path
    family: Family
    model: Any
    plain: PlainProcessor


@pytest.fixture(scope="module", params=NAMES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    tiny = TINY_FAMILIES[request.param]
    folder = tiny.write(tmp_path_factory.mktemp(request.param) / "teacher")
    family = open_family(folder, "auto", image_aspect="auto", max_length=2048)
    return World(request.param, folder, family, family.load(torch.float32), open_plain(tiny, folder))


def conversations(world: World) -> list[Sample]:
    """None, one, two and three images, one and two rounds, an image in the second round, odd sizes."""
    images = [tiny_image(number, size) for number, size in enumerate(SIZES)]
    made = [sample(f"one-{n}", (image,), "<image>\nWhat is it?", f"A star {n}.") for n, image in enumerate(images)]
    rounds = "<image>\nWhich colour?", "Red.", "<image>\nAnd it?", "It is 7."
    made.append(sample("two-rounds", (images[1], images[3]), *rounds))
    made.append(sample("three", tuple(images[:3]), "<image>\n<image>\n<image>\nHow many?", "No."))
    made.append(sample("text", (), "How many?", "Two objects.", "Sure?", "Yes."))
    if world.name == "paligemma":  # it needs an image, and attends to a whole prompt: one answer
        return [one for one in made if one.images and len(one.turns) == 2]
    return made


def sample(key: str, images: tuple[bytes, ...], *texts: str) -> Sample:
    turns = tuple(Turn("assistant" if n % 2 else "user", text) for n, text in enumerate(texts))
    return Sample(key, turns, images, ("png",) * len(images))


def engine_of(world: World, batch_size: int) -> HfCaptureEngine:
    size = len(world.family.encoder.tokenizer)
    return HfCaptureEngine(
        world.model,
        world.family,
        RecordSettings(1.0, size, 0, 1.0, ()),
        vocab_size=size,
        seed=0,
        batch_size=batch_size,
    )


def capture(world: World, samples: Sequence[Sample], batch_size: int) -> dict[Any, SequenceRecord]:
    engine = engine_of(world, batch_size)
    requests = [Request(n, s, tuple(world.family.encode(s, role) for role in s.roles)) for n, s in enumerate(samples)]
    found = {}
    for outcome in engine.capture(requests):
        assert isinstance(outcome, SequenceRecord), outcome
        found[outcome.key, outcome.role] = outcome
    return found


def assert_plain(world: World, samples: Sequence[Sample], batch_size: int, side: str) -> None:
    captured, size = capture(world, samples, batch_size), len(world.family.encoder.tokenizer)
    pairs = [(sample, role) for sample in samples for role in sample.roles]
    assert captured.keys() == {(sample.key, role) for sample, role in pairs}
    for pair in pairs:
        ((ids_T, logits_TV),) = world.plain.log_probs([pair], side)
        sequence = world.family.encode(*pair)
        assert ids_T[: len(sequence.input_ids_T)].tolist() == sequence.input_ids_T.tolist(), pair[0].key
        dense_NV = logits_TV[sequence.prediction_rows_N, :size].log_softmax(-1).numpy()
        records = captured[pair[0].key, pair[1]].records
        heads = records.topk_ids_H.reshape(len(dense_NV), size)
        found = np.empty_like(dense_NV)
        np.put_along_axis(found, heads.astype(np.int64), records.topk_log_probs_H.reshape(heads.shape), 1)
        assert np.abs(found - dense_NV).max() < 1e-4, pair[0].key
        target_N = dense_NV[np.arange(len(dense_NV)), sequence.target_ids_N]
        assert np.abs(records.target_log_probs_N - target_N).max() < 1e-4


@pytest.mark.parametrize(("batch_size", "side"), [(1, "left"), (8, "right")])
def test_captures_equal_the_processor_and_the_whole_model(world: World, batch_size: int, side: str) -> None:
    assert_plain(world, conversations(world), batch_size, side)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_reference_itself_does_not_depend_on_its_batches(world: World, side: str) -> None:
    """Otherwise a difference would mean nothing; the batch is padded, of different shapes, with images in every row."""
    samples = [one for one in conversations(world) if one.images]
    pairs = [(one, "response") for one in samples]
    for pair, (ids_T, rows_TV) in zip(pairs, world.plain.log_probs(pairs, side), strict=True):
        ((alone_T, alone_TV),) = world.plain.log_probs([pair], side)
        assert ids_T.tolist() == alone_T.tolist()
        assert (rows_TV - alone_TV).abs().max() < 1e-3


def test_images_decide_what_is_captured(world: World) -> None:
    first = conversations(world)[1]
    other = sample("other", (tiny_image(77, SIZES[1]),), *(turn.text for turn in first.turns))
    one, two = (capture(world, [which], 1).popitem()[1].records for which in (first, other))
    assert np.abs(one.target_log_probs_N - two.target_log_probs_N).max() > 1e-3


def test_answers_equal_those_of_the_plain_model(world: World) -> None:
    """A batch of prompts of different lengths and images, and one prompt without any."""
    engine, end = engine_of(world, 8), world.family.encoder.end_id
    asked = [one for one in conversations(world) if len(one.turns) == 2]
    if world.name != "paligemma":
        asked.append(sample("text", (), "How many?", "Two."))
    prompts = []
    for one in asked:
        sequence = world.family.encode(one, "response")
        ids_T = sequence.input_ids_T[: sequence.supervised_N[0]]
        prompts.append(Prompt(one.key, "", ids_T, tuple(world.family.images(one)), 99))
    rows = world.model.get_output_embeddings().weight.shape[0]
    never = [world.family.image_token_id, *range(engine.vocab_size, rows)]
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=6, eos_token_id=end, pad_token_id=end, suppress_tokens=never
    )
    answers = write_answers(engine, prompts, Decoding(0.0, 1.0, 6, 0))
    for one, prompt, answer in zip(asked, prompts, answers, strict=True):
        sequence = TokenizedSequence("", "", prompt.input_ids_T, np.zeros(0, np.int64))
        inputs = world.family.model_inputs([sequence], [world.family.images(one)])
        found = world.plain.model.generate(**inputs, generation_config=settings)
        expected = found[0, len(prompt.input_ids_T) :].tolist()
        assert [*answer.ids, *([end] if answer.ended else [])] == expected, one.key


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llava_next", "vipllava"])
def test_a_tokenizer_that_puts_spaces_and_a_start_before_text_is_followed(tmp_path: Path, name: str, kind: str) -> None:
    """Like Llama's, which most of these models come with."""
    tiny = TINY_FAMILIES[name]
    folder = tiny.write(tmp_path / "teacher", tokenizer=llama_tokenizer(kind))
    family = open_family(folder, "auto", image_aspect="auto", max_length=2048)
    assert family.encoder.start_ids == (1,)
    world = World(name, folder, family, family.load(torch.float32), open_plain(tiny, folder))
    assert_plain(world, conversations(world), 4, "right")
