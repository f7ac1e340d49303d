"""Every family of image-text teachers: captures equal what the official processor and the whole model give."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llavamod_offline.data.encode.template import get_template
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.errors import ConfigError, DataError, ModelError
from llavamod_offline.families import SampleImage, open_family
from llavamod_offline.families.llava.family import LlavaFamily
from llavamod_offline.families.protocol import FeatureFamily
from teacher_cache.engines.hf import HfCaptureEngine
from teacher_cache.engines.protocol import Request
from teacher_cache.format.record import RecordSettings
from teacher_cache.format.sequences import SequenceRecord
from tests.llavamod_offline.families.official import FAMILIES, LLAVAS, Official, open_official, write_family
from tests.tiny import tiny_image

# For single images: squares, landscapes and portraits, below and above the processors' size limits.
SIZES = ((24, 24), (60, 31), (17, 44), (9, 9), (150, 40), (33, 100))


@dataclasses.dataclass(frozen=True)
class Opened:
    name: str
    folder: Path
    teacher: FeatureFamily
    model: Any
    official: Official

    @property
    def vocab_size(self) -> int:
        return len(self.teacher.encoder.tokenizer)

    def capture(self, samples: Sequence[Sample], batch_size: int = 5, **settings: Any) -> dict[Any, SequenceRecord]:
        engine = HfCaptureEngine(
            self.model,
            self.teacher,
            RecordSettings(1.0, self.vocab_size, 0, 1.0, ()),
            vocab_size=self.vocab_size,
            seed=0,
            batch_size=batch_size,
            **settings,
        )
        requests = [
            Request(row, s, tuple(self.teacher.encode(s, role) for role in s.roles)) for row, s in enumerate(samples)
        ]
        found = {}
        for outcome in engine.capture(requests):
            assert isinstance(outcome, SequenceRecord), outcome
            found[outcome.key, outcome.role] = outcome
        return found


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    folder = write_family(request.param, tmp_path_factory.mktemp(request.param) / "teacher")
    aspect = "square" if request.param in LLAVAS else "auto"
    teacher = open_family(folder, get_template("chatml"), image_aspect=aspect, max_length=1024)
    assert isinstance(teacher, FeatureFamily)
    model = teacher.load(torch.float32)
    return Opened(request.param, folder, teacher, model, open_official(request.param, folder))


def conversations() -> list[Sample]:
    """One, two and three images, none, one and two turns, an image in the second turn."""
    images = [tiny_image(number, size) for number, size in enumerate(SIZES)]
    made = [_sample(f"one-{n}", (image,), ("<image>\nWhat is it?", f"A star {n}.")) for n, image in enumerate(images)]
    two = "<image>\nWhich colour?", "Red.", "And the <image> number?", "It is 7."
    made.append(_sample("two-turns", (images[1], images[4]), two))
    made.append(_sample("three", tuple(images[:3]), ("<image><image> text <image>", "No.")))
    made.append(_sample("text", (), ("How many?", "Two objects.", "Sure?", "Yes.")))
    return made


def preferences() -> list[Sample]:
    """Answers with a common beginning, and answers of different lengths; with one image, two, and none."""
    turns = (Turn("user", "<image>\nWhat is it?"),)
    images = [tiny_image(number, size) for number, size in enumerate(SIZES)]
    answers = [
        ("A red star.", "A red circle and a square."),
        ("Yes.", "No, there is none in it."),
        ("It is.", "It was."),
    ]
    made = [Sample(f"pair-{n}", turns, (images[n],), ("png",), *pair) for n, pair in enumerate(answers)]
    two = (Turn("user", "<image> <image>"), Turn("assistant", "Well."), Turn("user", "How many?"))
    made.append(Sample("pair-two", two, (images[3], images[5]), ("png", "png"), "Two.", "There are seven objects."))
    made.append(Sample("pair-text", (Turn("user", "How many?"),), (), (), "One.", "One or two."))
    return made


def _sample(key: str, images: tuple[bytes, ...], texts: tuple[str, ...]) -> Sample:
    turns = tuple(Turn("assistant" if n % 2 else "user", text) for n, text in enumerate(texts))
    return Sample(key, turns, images, ("png",) * len(images))


def _assert_official(family: Opened, samples: Sequence[Sample], captured: dict[Any, SequenceRecord]) -> None:
    pairs = [(sample, role) for sample in samples for role in sample.roles]
    assert captured.keys() == {(sample.key, role) for sample, role in pairs}
    for (sample, role), (ids_T, logits_TV) in zip(pairs, family.official.log_probs(pairs), strict=True):
        sequence = family.teacher.encode(sample, role)
        assert np.array_equal(sequence.input_ids_T, ids_T), (sample.key, role)
        dense_NV = logits_TV[sequence.prediction_rows_N, : family.vocab_size].log_softmax(-1).numpy()
        records = captured[sample.key, role].records
        heads = records.topk_ids_H.reshape(len(dense_NV), family.vocab_size)
        found = np.empty_like(dense_NV)
        np.put_along_axis(found, heads.astype(np.int64), records.topk_log_probs_H.reshape(heads.shape), 1)
        assert np.allclose(found, dense_NV, atol=1e-4), (sample.key, role, np.abs(found - dense_NV).max())


def test_conversations_are_captured_as_the_official_processor_shows_them(family: Opened) -> None:
    samples = conversations()
    _assert_official(family, samples, family.capture(samples))


def test_text_alone_is_captured_in_a_batch_of_its_own(family: Opened) -> None:
    samples = [sample for sample in conversations() if not sample.images]
    _assert_official(family, samples, family.capture(samples))


@pytest.mark.parametrize("shared", [False, True])
def test_preferences_are_captured_alike_with_and_without_shared_prompts(family: Opened, shared: bool) -> None:
    samples = preferences()
    _assert_official(family, samples, family.capture(samples, batch_size=4, shared_prompts=shared))
    # Batches that separate the two answers of a pair.
    _assert_official(family, samples, family.capture(samples, batch_size=3, shared_prompts=shared))


def test_pictures_decide_what_is_captured(family: Opened) -> None:
    """Otherwise the tests above would pass on a model that ignores images."""
    first = conversations()[1]
    other = dataclasses.replace(first, images=(tiny_image(77, SIZES[1]),))
    gaps = [
        np.abs(one.records.target_log_probs_N - two.records.target_log_probs_N).max()
        for one, two in zip(family.capture([first]).values(), family.capture([other]).values(), strict=True)
    ]
    assert min(gaps) > 1e-3


def test_a_picture_runs_through_the_tower_once_for_all_roles(family: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    run = family.teacher.image_features

    def counted(model: Any, pictures: Sequence[SampleImage]) -> list[torch.Tensor]:
        counts.append(len(pictures))
        return run(model, pictures)

    monkeypatch.setattr(family.teacher, "image_features", counted)
    family.capture(preferences(), batch_size=16)
    assert counts == [5]


def test_all_positions_with_hidden_states_of_image_patches(family: Opened) -> None:
    samples = [*preferences()[:2], *conversations()[:2], *conversations()[-1:]]
    for shared in (False, True):
        captured = family.capture(samples, positions="all", hidden_positions="image", shared_prompts=shared)
        for sample in samples:
            for role in sample.roles:
                sequence, record = family.teacher.encode(sample, role), captured[sample.key, role]
                ids_T, logits_TV = family.official.log_probs([(sample, role)])[0]
                assert len(record.records) == len(ids_T)
                dense_TV = logits_TV[:, : family.vocab_size].log_softmax(-1)
                entropy_T = -(dense_TV.exp() * dense_TV).sum(-1).numpy()
                assert np.allclose(record.records.entropy_N, entropy_T, atol=1e-4)
                assert record.hidden is not None
                image = np.flatnonzero(sequence.input_ids_T == family.teacher.image_token_id)
                assert np.array_equal(record.hidden.rows_M, image)
                head = family.model.get_output_embeddings().weight.detach().numpy()
                assert np.allclose(record.hidden.states_MD @ head.T, logits_TV.numpy()[image], atol=1e-3)


def test_headers_alone_tell_the_tokens_of_any_shape(family: Opened) -> None:
    """`encode` reads only headers, `pictures` prepares pixels: they must agree, for one image and for several."""
    rng = np.random.default_rng(0)
    sizes = [*((int(w), int(h)) for w, h in rng.integers(1, 120, size=(60, 2))), (100, 1), (1, 100), (400, 3)]
    for number, size in enumerate(sizes):
        image = tiny_image(number, size, "JPEG" if number % 2 else "PNG")
        for count in (1, 2):
            sample = _sample("k", (image,) * count, ("<image>" * count + "a", "b"))
            sequence = family.teacher.encode(sample, "response")
            pictures = family.teacher.images(sample)
            assert (sequence.input_ids_T == family.teacher.image_token_id).sum() == sum(p.tokens for p in pictures)
            features = family.teacher.image_features(family.model, pictures)
            assert [len(feature) for feature in features] == [p.tokens for p in pictures], (size, count)
            assert all(feature.isfinite().all() for feature in features)


def test_padding_to_squares_is_ours_where_it_is_asked_for(family: Opened) -> None:
    teacher = open_family(family.folder, get_template("chatml"), image_aspect="pad", max_length=1024)
    wide, square = (_sample("k", (tiny_image(1, size),), ("<image>a", "b")) for size in ((60, 20), (60, 60)))
    lengths = {len(teacher.encode(sample, "response").input_ids_T) for sample in (wide, square)}
    assert len(lengths) == 1
    assert teacher.images(wide)[0].tokens == teacher.images(square)[0].tokens
    assert teacher.describe_images()["aspect"] == "pad"
    assert teacher.describe_images() != family.teacher.describe_images()


def test_a_picture_that_the_processor_refuses_is_a_data_error(family: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("not with me")

    if isinstance(family.teacher, LlavaFamily):
        monkeypatch.setattr(family.teacher.preprocessor, "pixels", refuse)
    else:
        monkeypatch.setattr(family.teacher, "processor", refuse)
    with pytest.raises(DataError, match=r"sample 'one-0': its image cannot be prepared: not with me"):
        family.teacher.images(conversations()[0])


def test_a_setting_without_a_meaning_is_refused(family: Opened) -> None:
    if family.name in LLAVAS:
        return
    with pytest.raises(ConfigError, match="image_aspect is 'square'"):
        open_family(family.folder, get_template("chatml"), image_aspect="square", max_length=1024)


def test_a_foreign_tokenizer_is_refused(family: Opened, tmp_path: Path) -> None:
    import shutil

    from tests.tiny_teachers import tokenizer_with

    folder = shutil.copytree(family.folder, tmp_path / "copy")
    tokenizer_with("<|first|>", "<image>", "<|image_pad|>").save_pretrained(folder)
    with pytest.raises(ModelError, match="use the tokenizer that belongs to the checkpoint"):
        open_family(folder, get_template("chatml"), image_aspect="auto", max_length=1024)


def test_a_tower_that_llavas_model_cannot_run_alone_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = write_family("llava_siglip", tmp_path / "teacher")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] = {"model_type": "vit", "image_size": 24, "patch_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="of type 'vit', which is none of clip_vision_model, siglip_vision_model"):
        open_family(folder, "chatml", image_aspect="auto", max_length=1024)


@pytest.mark.parametrize("name", LLAVAS)
def test_a_tower_of_another_size_than_the_images_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_family(name, tmp_path / "teacher")
    file = folder / "preprocessor_config.json"
    content = json.loads(file.read_text())
    key = "crop_size" if "crop_size" in content else "size"
    file.write_text(json.dumps(content | {key: {"height": 32, "width": 32}}))
    teacher = open_family(folder, "chatml", image_aspect="auto", max_length=1024)
    with pytest.raises(ModelError, match=f"{key} .* does not fit the vision tower's 24 pixels"):
        teacher.load(torch.float32)
