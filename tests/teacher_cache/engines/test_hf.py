"""The Hugging Face engine against a plain forward pass of the same model, one unpadded sequence at a time."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llavamod_offline.data.encode.template import get_template
from llavamod_offline.data.encode.tokenize import SequenceEncoder, TokenizedSequence
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.errors import DataError, ModelError
from llavamod_offline.families.llava.family import LlavaFamily
from llavamod_offline.models.lm_head import LmHead
from teacher_cache.engines.hf import HfCaptureEngine, length_batches
from teacher_cache.engines.lm_head import Float32Head
from teacher_cache.engines.protocol import Request
from teacher_cache.format.record import RecordSettings
from teacher_cache.format.rejection import Rejection
from teacher_cache.format.sequences import SequenceRecord
from tests.tiny import tiny_image, tiny_samples, write_tiny_llava

SETTINGS = RecordSettings(0.9, 12, 8, 40.0, (2.0, 4.0), (1,))
IMAGE = tiny_image(5)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A loaded tiny teacher with its tokenizer, encoder and engine."""

    model: Any
    family: LlavaFamily

    @property
    def encoder(self) -> SequenceEncoder:
        return self.family.encoder

    @property
    def vocab_size(self) -> int:
        return len(self.encoder.tokenizer)

    def engine(self, batch_size: int = 8, settings: RecordSettings = SETTINGS) -> HfCaptureEngine:
        return HfCaptureEngine(
            self.model,
            self.family,
            settings,
            vocab_size=self.vocab_size,
            seed=0,
            batch_size=batch_size,
        )

    def requests(self, samples: Sequence[Sample]) -> list[Request]:
        return [
            Request(row, s, tuple(self.encoder.encode(s, role) for role in s.roles)) for row, s in enumerate(samples)
        ]

    def capture(self, samples: Sequence[Sample], **settings: Any) -> dict[tuple[str, str], SequenceRecord]:
        outcomes = list(self.engine(**settings).capture(self.requests(samples)))
        assert not [outcome for outcome in outcomes if isinstance(outcome, Rejection)]
        return {(o.key, o.role): o for o in outcomes if isinstance(o, SequenceRecord)}

    @torch.inference_mode()
    def log_probs(self, sample: Sample, sequence: TokenizedSequence) -> torch.Tensor:
        """[T, V] of the whole sequence: row t is the distribution of token t + 1."""
        pixels = [torch.from_numpy(self.family.preprocessor.pixels(i, name=sample.key)) for i in sample.images]
        logits = self.model(
            input_ids=torch.from_numpy(sequence.input_ids_T)[None],
            pixel_values=torch.stack(pixels) if pixels else None,
        ).logits
        dense_TV: torch.Tensor = logits[0, :, : self.vocab_size].float().log_softmax(-1)
        return dense_TV


def load_teacher(folder: Path, dtype: torch.dtype = torch.float32) -> Teacher:
    family = LlavaFamily(folder, get_template("qwen"), image_aspect="pad", max_length=512)
    return Teacher(family.load(dtype), family)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    # An LM head with more rows than the tokenizer has ids: the surplus must not enter any distribution.
    folder = write_tiny_llava(tmp_path_factory.mktemp("hf") / "teacher", head_rows=448)
    return load_teacher(folder)


def _assert_live(record: SequenceRecord, dense_NV: torch.Tensor, sequence: TokenizedSequence) -> None:
    records = record.records
    assert record.target_hash == sequence.target_hash
    assert np.array_equal(records.target_ids_N, sequence.target_ids_N)
    targets = dense_NV.gather(1, torch.from_numpy(sequence.target_ids_N)[:, None])[:, 0].numpy()
    assert np.allclose(records.target_log_probs_N, targets, atol=2e-5)
    assert np.allclose(records.entropy_N, -(dense_NV.exp() * dense_NV).sum(-1).numpy(), atol=2e-5)
    assert np.allclose(records.log_normalisers_NS[:, 0], (dense_NV / 2).logsumexp(-1).numpy(), atol=2e-5)
    for row, piece in enumerate(records.split([1] * len(records))):
        head = torch.from_numpy(piece.topk_ids_H).long()
        assert np.allclose(piece.topk_log_probs_H, dense_NV[row][head].numpy(), atol=2e-5)
        assert set(dense_NV[row].topk(3).indices[: len(head) - 1].tolist()) <= set(head.tolist())
        tail = dense_NV[row].clone()
        tail[head] = float("-inf")
        assert piece.tail_log_mass_N[0] == pytest.approx(float(tail.logsumexp(-1)), abs=2e-5)
        assert not set(piece.tail_ids_D.tolist()) & set(head.tolist())


@pytest.mark.parametrize("preference", [False, True])
def test_cached_numbers_are_those_of_a_live_forward(teacher: Teacher, preference: bool) -> None:
    """Text-only, two-turn, two-image and preference samples, in padded batches."""
    samples = tiny_samples(14, seed=1, preference=preference)
    kinds = {(len(s.images), len(s.turns)) for s in samples}
    assert {0, 1, 2} <= {images for images, _ in kinds}
    captured = teacher.capture(samples)
    assert len(captured) == 14 * (2 if preference else 1)
    for sample in samples:
        for role in sample.roles:
            sequence = teacher.encoder.encode(sample, role)
            dense_NV = teacher.log_probs(sample, sequence)[torch.from_numpy(sequence.prediction_rows_N)]
            _assert_live(captured[sample.key, role], dense_NV, sequence)


def test_the_first_answer_token_is_distilled(teacher: Teacher) -> None:
    """One-token answers are predicted by the prompt's last row; a shift by one would show at once."""
    end = teacher.encoder.end_id
    for word in ("Yes", "No", "7"):
        turns = (Turn("user", "<image>\nIs there a red circle?"), Turn("assistant", word))
        sample = Sample("one", turns, (IMAGE,), ("png",))
        sequence = teacher.encoder.encode(sample, "response")
        answer = [int(token) for token in sequence.target_ids_N]
        assert answer[-1] == end
        live_TV = teacher.log_probs(sample, sequence)
        prompt = teacher.encoder.encode_prompt(turns[:1])
        assert np.array_equal(sequence.input_ids_T[: len(prompt)], prompt)
        record = teacher.capture([sample])["one", "response"].records
        assert record.target_ids_N[0] == answer[0] == sequence.input_ids_T[len(prompt)]
        first = float(record.target_log_probs_N[0])
        assert first == pytest.approx(float(live_TV[len(prompt) - 1, answer[0]]), abs=2e-5)
        for shifted in (len(prompt) - 2, len(prompt)):
            assert abs(first - float(live_TV[shifted, answer[0]])) > 0.01
        # The prompt alone gives the same: the answer itself was not seen.
        alone = teacher.log_probs(sample, dataclasses.replace(sequence, input_ids_T=prompt))
        assert first == pytest.approx(float(alone[-1, answer[0]]), abs=2e-5)


def test_the_batch_size_changes_nothing_but_rounding(teacher: Teacher) -> None:
    samples = [*tiny_samples(12, seed=2), *tiny_samples(6, seed=3, preference=True)]
    ones, many = (teacher.capture(samples, batch_size=size) for size in (1, 16))
    assert ones.keys() == many.keys()
    for name, one in ones.items():
        for field in ("target_log_probs_N", "entropy_N", "tail_log_mass_N", "log_normalisers_NS"):
            left, right = getattr(one.records, field), getattr(many[name].records, field)
            assert np.allclose(left, right, atol=3e-5), (name, field)
        dense = [dict(zip(r.records.topk_ids_H, r.records.topk_log_probs_H, strict=True)) for r in (one, many[name])]
        assert dense[0].keys() == dense[1].keys()
        # Tail samples are the same ids unless a point lies within rounding of an interval's edge.
        both = [set(zip(_rows(r), r.records.tail_ids_D.tolist(), strict=True)) for r in (one, many[name])]
        assert len(both[0] ^ both[1]) <= 0.02 * len(both[0]) + 2


def test_batches_depend_on_the_shard_alone(teacher: Teacher) -> None:
    samples = tiny_samples(20, seed=4, preference=True)
    requests = teacher.requests(samples)
    batches = list(length_batches(requests, 6))
    assert [len(batch) for batch in batches] == [6, 6, 6, 6, 6, 6, 4]
    assert batches == list(length_batches(list(reversed(requests)), 6))
    lengths = [max(len(s.input_ids_T) for s in request.sequences) for batch in batches for request, _ in batch]
    assert lengths == sorted(lengths, reverse=True)
    rows = [request.row for batch in batches for request, _ in batch]
    assert rows[::2] == rows[1::2]


def test_a_sequence_with_logits_that_are_not_finite_is_rejected_alone(teacher: Teacher) -> None:
    """One token's embedding is NaN: only sequences that contain it are lost."""
    samples = tiny_samples(8, seed=5)
    poison = teacher.encoder.tokenizer("purple zebra", add_special_tokens=False)["input_ids"][-1]
    bad = Sample("bad", (Turn("user", "purple zebra?"), Turn("assistant", "A purple zebra.")))
    sequences = [r.sequences[0].input_ids_T for r in teacher.requests(samples)]
    assert not any(poison in ids for ids in sequences)
    weight = teacher.model.get_input_embeddings().weight
    untied = weight.detach().clone()
    with torch.no_grad():
        weight[poison] = float("nan")
    try:
        engine = teacher.engine()
        engine.lm_head = Float32Head(LmHead(untied), teacher.vocab_size)  # the tiny LM head is tied: keep it finite
        outcomes = list(engine.capture(teacher.requests([*samples, bad])))
    finally:
        with torch.no_grad():
            weight.copy_(untied)
    rejected = [outcome for outcome in outcomes if isinstance(outcome, Rejection)]
    assert [item.key for item in rejected] == ["bad"]
    assert "not finite (NaN or inf), first at position" in rejected[0].reason
    sound = teacher.capture(samples)
    for outcome in outcomes:
        if isinstance(outcome, SequenceRecord):
            expected = sound[outcome.key, outcome.role].records.target_log_probs_N
            assert np.allclose(outcome.records.target_log_probs_N, expected, atol=3e-5)


def test_an_image_that_cannot_be_read_rejects_its_sample_alone(teacher: Teacher) -> None:
    samples = tiny_samples(4, seed=6, preference=True)
    assert samples[1].images
    broken = dataclasses.replace(samples[1], images=(b"\x89PNG broken",))

    requests = teacher.requests(samples)
    requests[1] = dataclasses.replace(requests[1], sample=broken)
    outcomes = list(teacher.engine().capture(requests))
    rejected = [outcome for outcome in outcomes if isinstance(outcome, Rejection)]
    assert {(item.key, item.role) for item in rejected} == {(samples[1].key, "chosen"), (samples[1].key, "rejected")}
    assert all(samples[1].key in item.reason for item in rejected)
    assert len(outcomes) == 8


def test_a_defect_while_images_are_prepared_is_no_rejection(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    def images(sample: Sample) -> Any:
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(teacher.family, "images", images)
    with pytest.raises(RuntimeError, match="disk on fire"):
        list(teacher.engine().capture(teacher.requests(tiny_samples(4, seed=6))))


def test_a_target_beyond_the_shared_vocabulary_is_rejected(teacher: Teacher) -> None:
    samples = tiny_samples(2, seed=7)
    requests = teacher.requests(samples)
    ids = requests[0].sequences[0].input_ids_T.copy()
    ids[requests[0].sequences[0].supervised_N[0]] = teacher.vocab_size + 3
    requests[0] = dataclasses.replace(
        requests[0], sequences=(dataclasses.replace(requests[0].sequences[0], input_ids_T=ids),)
    )
    outcomes = list(teacher.engine().capture(requests))
    reasons = {outcome.key: outcome.reason for outcome in outcomes if isinstance(outcome, Rejection)}
    assert list(reasons) == [samples[0].key]
    assert f"id {teacher.vocab_size + 3} is beyond the {teacher.vocab_size} ids" in reasons[samples[0].key]


def test_out_of_memory_halves_the_batch_and_says_so(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    samples = tiny_samples(10, seed=8)
    expected = teacher.capture(samples)
    sizes = []
    forward = teacher.model.model.language_model.forward

    def small_device(**inputs: Any) -> Any:
        sizes.append(len(inputs["attention_mask"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError
        return forward(**inputs)

    monkeypatch.setattr(teacher.model.model.language_model, "forward", small_device)
    with caplog.at_level(logging.WARNING):
        captured = teacher.capture(samples)
    assert sizes == [8, 4, 2, 2, 2, 2, 2]
    assert "out of memory with 8 sequences at once: continuing with 4" in caplog.text
    assert captured.keys() == expected.keys()
    for name, record in captured.items():
        left, right = record.records.target_log_probs_N, expected[name].records.target_log_probs_N
        assert np.allclose(left, right, atol=3e-5)


def test_a_sequence_too_large_for_the_device_is_one_clear_error(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_device(**_: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(teacher.model.model.language_model, "forward", no_device)
    with pytest.raises(ModelError, match=r"sample 'tiny-\d+' \(response\): its \d+ tokens do not fit"):
        teacher.capture(tiny_samples(3, seed=8), batch_size=2)


def test_lower_precision_stays_close(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "teacher")
    full, half = load_teacher(folder), load_teacher(folder, torch.bfloat16)
    samples = tiny_samples(4, seed=9)
    exact, rounded = full.capture(samples), half.capture(samples)
    for name, record in rounded.items():
        gap = np.abs(record.records.target_log_probs_N - exact[name].records.target_log_probs_N)
        assert 0 < gap.max() < 1.0


def test_a_sample_longer_than_max_length_never_reaches_the_engine(teacher: Teacher) -> None:
    with pytest.raises(DataError, match="more than max_length"):
        teacher.encoder.encode(Sample("k", (Turn("user", "a b " * 600), Turn("assistant", "c"))), "response")


def _rows(record: SequenceRecord) -> list[int]:
    return np.repeat(np.arange(len(record.records)), record.records.tail_counts_N).tolist()
