"""Batches: right padding, and every supervised token assigned to the row that predicts it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from llavamod_offline.data.encode.collate import Batch, collate
from llavamod_offline.data.encode.template import get_template
from llavamod_offline.data.encode.tokenize import SequenceEncoder, TokenizedSequence
from llavamod_offline.data.order.schedule import BatchSchedule
from llavamod_offline.data.order.stream import Order
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.errors import DataError
from tests.tiny import tiny_samples, tiny_tokenizer

PAD = 3
Pixels = NDArray[np.float32]


def sequence(key: str, ids: list[int], supervised: list[int], role: str = "response") -> TokenizedSequence:
    return TokenizedSequence(key, role, np.array(ids, dtype=np.int64), np.array(supervised, dtype=np.int64))


def picture(value: float, size: int = 4) -> Pixels:
    return np.full((3, size, size), value, dtype=np.float32)


def test_a_batch_by_hand() -> None:
    sequences = [sequence("a", [5, 6, 7], [2]), sequence("b", [8, 9, 10, 11, 12], [1, 3, 4], "chosen")]
    batch = collate(sequences, [[picture(1.0)], [picture(2.0), picture(3.0)]], pad_id=PAD)
    assert batch.input_ids_BT.tolist() == [[5, 6, 7, PAD, PAD], [8, 9, 10, 11, 12]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.prediction_rows_N.tolist() == [1, 5, 7, 8]
    assert batch.target_ids_N.tolist() == [7, 9, 11, 12]
    assert batch.sequence_of_N.tolist() == [0, 1, 1, 1]
    assert batch.pixel_values_ICHW is not None
    assert batch.pixel_values_ICHW[:, 0, 0, 0].tolist() == [1.0, 2.0, 3.0]
    assert (batch.keys, batch.roles, len(batch), batch.tokens) == (("a", "b"), ("response", "chosen"), 2, 8)
    integers = [value for value in vars(batch).values() if isinstance(value, torch.Tensor) and value.ndim < 4]
    assert {value.dtype for value in integers} == {torch.int64}


def test_bytes_become_pixels_where_the_batch_lies() -> None:
    """Until then they take a quarter of the memory; each byte value maps to its own float in each channel."""
    rng = np.random.default_rng(0)
    values_3V = rng.normal(size=(3, 256)).astype(np.float32)
    bytes_IHW3 = rng.integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    sequences = [sequence(key, [5, 6], [1]) for key in "ab"]
    batch = collate(sequences, [[image] for image in bytes_IHW3], pad_id=PAD, byte_values_CV=values_3V)
    assert batch.images is not None
    assert np.shares_memory(batch.images.numpy(), bytes_IHW3)  # slices of one array are not copied
    expected = np.stack([values_3V[channel][bytes_IHW3[..., channel]] for channel in range(3)], axis=1)
    assert batch.pixel_values_ICHW is not None
    assert np.array_equal(batch.pixel_values_ICHW.numpy(), expected)
    moved = batch.to("meta")
    assert moved.pixel_values_ICHW is not None
    assert (moved.pixel_values_ICHW.device.type, moved.pixel_values_ICHW.shape) == ("meta", (2, 3, 4, 5))


def test_text_only_batches_have_no_pixels() -> None:
    batch = collate([sequence("a", [5, 6], [1])], [[]], pad_id=PAD)
    assert batch.pixel_values_ICHW is None
    assert batch.to("cpu").pixel_values_ICHW is None
    values_3V = np.zeros((3, 256), np.float32)
    assert collate([sequence("a", [5, 6], [1])], [[]], pad_id=PAD, byte_values_CV=values_3V).byte_values_CV is None


def test_to_moves_every_tensor() -> None:
    batch = collate([sequence("a", [5, 6], [1])], [[picture(1.0)]], pad_id=PAD).to("meta")
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 6
    assert all(tensor.is_meta for tensor in tensors)


def test_what_does_not_fit() -> None:
    with pytest.raises(DataError, match=r"0 sequences"):
        collate([], [], pad_id=PAD)
    with pytest.raises(DataError, match=r"1 sequence with the images of 2"):
        collate([sequence("a", [5, 6], [1])], [[], []], pad_id=PAD)
    with pytest.raises(DataError, match=r"sample 'b': an image of shape \(3, 5, 5\) in a batch of \(3, 4, 4\)"):
        collate(
            [sequence("a", [5, 6], [1]), sequence("b", [5, 6], [1])], [[picture(1)], [picture(1, size=5)]], pad_id=PAD
        )


TOKENIZER = tiny_tokenizer()
ENCODER = SequenceEncoder(
    TOKENIZER,
    get_template("qwen"),
    image_token_id=TOKENIZER.convert_tokens_to_ids("<image>"),
    image_tokens=9,
    max_length=512,
)


def batch_of(samples: list[Sample]) -> Batch:
    sequences = [ENCODER.encode(sample, role) for sample in samples for role in sample.roles]
    return collate(sequences, [[] for _ in sequences], pad_id=PAD)


@pytest.mark.parametrize("preference", [False, True])
def test_rows_of_a_models_output_predict_the_targets(preference: bool) -> None:
    """A model that knows the next token predicts it at exactly these rows, in the sequences' order."""
    samples = tiny_samples(8, preference=preference)
    batch = batch_of(samples)
    next_ids_BT = torch.roll(batch.input_ids_BT, -1, dims=1)
    assert torch.equal(next_ids_BT.reshape(-1)[batch.prediction_rows_N], batch.target_ids_N)
    sequences = [ENCODER.encode(sample, role) for sample in samples for role in sample.roles]
    assert batch.target_ids_N.tolist() == np.concatenate([s.target_ids_N for s in sequences]).tolist()
    assert bool(batch.attention_mask_BT.reshape(-1)[batch.prediction_rows_N + 1].all())
    assert batch.sequence_of_N.tolist() == (batch.prediction_rows_N // batch.input_ids_BT.shape[1]).tolist()


def test_one_token_answer_is_predicted_by_the_prompts_last_row() -> None:
    encoder = SequenceEncoder(TOKENIZER, get_template("chatml"), image_token_id=1, image_tokens=9, max_length=512)
    sample = Sample("k", (Turn("user", "Which number?"), Turn("assistant", "7")))
    prompt = encoder.encode_prompt(sample.turns[:1])
    padded = sequence("long", list(range(90)), [89])
    batch = collate([padded, encoder.encode(sample, "response")], [[], []], pad_id=PAD)
    answer, end = (TOKENIZER.convert_tokens_to_ids(token) for token in ("7", "<|im_end|>"))
    assert batch.target_ids_N[1:].tolist() == [answer, end]
    assert (batch.prediction_rows_N[1:] - 90).tolist() == [len(prompt) - 1, len(prompt)]


class _Encoded:
    """A map-style data set of encoded samples."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __getitem__(self, row: int) -> TokenizedSequence:
        return ENCODER.encode(self.samples[row], "response")


def _collate(sequences: list[TokenizedSequence]) -> Batch:
    return collate(sequences, [[] for _ in sequences], pad_id=PAD)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches_for_any_number_of_workers(workers: int) -> None:
    samples = [dataclasses.replace(sample, key=f"k{row}") for row, sample in enumerate(tiny_samples(10))]
    schedule = BatchSchedule(Order(10, seed=1, batch_size=4), stop=6, micro_batch_size=3)
    loader: DataLoader[TokenizedSequence] = DataLoader(
        _Encoded(samples),  # type: ignore[arg-type]
        batch_sampler=schedule,
        collate_fn=_collate,
        num_workers=workers,
    )
    found = [batch.keys for batch in loader]
    assert len(loader) == len(found) == 12
    assert found == [tuple(f"k{row}" for row in rows) for rows in schedule]


def test_an_image_that_stands_at_several_places_is_held_once() -> None:
    """A sample's roles share the same array objects; equal arrays from different samples count as different images."""
    own, other, equal = picture(1.0), picture(2.0), picture(1.0)
    sequences = [sequence(key, [5, 6], [1], role) for role in ("chosen", "rejected") for key in "abc"]
    batch = collate(sequences, [[own, other], [], [equal]] * 2, pad_id=PAD)
    assert batch.pixel_values_ICHW is not None
    assert batch.image_rows_P is not None
    assert batch.pixel_values_ICHW[:, 0, 0, 0].tolist() == [1.0, 2.0, 1.0]
    assert batch.image_rows_P.tolist() == [0, 1, 2, 0, 1, 2]
    assert batch.to("meta").image_rows_P.device.type == "meta"  # type: ignore[union-attr]
    assert collate(sequences[:1], [[own]], pad_id=PAD).image_rows_P is None
