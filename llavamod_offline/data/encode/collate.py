"""Sequences and pixels → one right-padded batch, with the positions of all supervised tokens.

Shape suffixes: B sequences, T tokens of the longest, N supervised tokens in total, I images, P places of images in the
sequences, C channels, H and W pixels, V the 256 values of a byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llavamod_offline.data.encode.tokenize import UNSUPERVISED, Positions, TokenizedSequence
from llavamod_offline.data.images import pixel_values
from llavamod_offline.errors import DataError
from llavamod_offline.plural import counted


@dataclass(frozen=True)
class Batch:
    """What a model and a loss need for B sequences; supervised tokens are in order, sequence by sequence.

    `input_ids_BT`, `attention_mask_BT` int64, padded on the right. `images`: in the order of the image tokens, None
    if there are none; either pixels [I, C, H, W] float32, or bytes [I, H, W, C], a quarter of the size, whose pixels
    `byte_values_CV` gives. `image_rows_P`: the image at each place, in the order of the image tokens; None if every
    image has one place. `prediction_rows_N`: rows of the logits, flattened to [B·T, vocabulary], that predict the
    tokens `target_ids_N` (−1: none is supervised); `sequence_of_N`: the sequence of each. `keys`, `roles`: of each
    sequence. `inputs`: by name, all else that a model takes whose images are not such a tensor (see
    `families.students`).
    """

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    images: Tensor | None
    prediction_rows_N: Tensor
    target_ids_N: Tensor
    sequence_of_N: Tensor
    keys: tuple[str, ...]
    roles: tuple[str, ...]
    image_rows_P: Tensor | None = None
    byte_values_CV: Tensor | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def tokens(self) -> int:
        """The number of tokens in all sequences, without padding."""
        return int(self.attention_mask_BT.sum())

    @property
    def pixel_values_ICHW(self) -> Tensor | None:
        """The images' pixels, float32; computed from bytes on the batch's device, and not kept."""
        if self.images is None or self.byte_values_CV is None:
            return self.images
        return pixel_values(self.images, self.byte_values_CV)

    def model_inputs(self) -> dict[str, Tensor]:
        """The keyword arguments of a transformers model: ids, mask, pixels, and labels (−100: not supervised)."""
        labels_M = torch.full_like(self.input_ids_BT, UNSUPERVISED).flatten()
        supervised_N = self.target_ids_N >= 0
        labels_M[self.prediction_rows_N[supervised_N] + 1] = self.target_ids_N[supervised_N]
        inputs = {
            "input_ids": self.input_ids_BT,
            "attention_mask": self.attention_mask_BT,
            "labels": labels_M.view_as(self.input_ids_BT),
            **self.inputs,
        }
        pixel_values_ICHW = self.pixel_values_ICHW
        if pixel_values_ICHW is not None:
            rows_P = self.image_rows_P
            inputs["pixel_values"] = pixel_values_ICHW if rows_P is None else pixel_values_ICHW[rows_P]
        return inputs

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Move every tensor to `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Pin every tensor, for overlapped copies to a GPU."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, move: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            input_ids_BT=move(self.input_ids_BT),
            attention_mask_BT=move(self.attention_mask_BT),
            images=None if self.images is None else move(self.images),
            image_rows_P=None if self.image_rows_P is None else move(self.image_rows_P),
            byte_values_CV=None if self.byte_values_CV is None else move(self.byte_values_CV),
            prediction_rows_N=move(self.prediction_rows_N),
            target_ids_N=move(self.target_ids_N),
            sequence_of_N=move(self.sequence_of_N),
            inputs={name: move(tensor) for name, tensor in self.inputs.items()},
        )


def collate(
    sequences: Sequence[TokenizedSequence],
    images: Sequence[Sequence[NDArray[Any]]],
    *,
    pad_id: int,
    positions: Positions = "response",
    byte_values_CV: NDArray[np.float32] | None = None,
) -> Batch:
    """Assemble a batch; `images` holds each sequence's images in the order of their placeholders.

    An image is pixels [C, H, W] float32 or, with `byte_values_CV`, bytes [H, W, C] (see `Batch`).
    With `positions` "all", the N positions are all tokens except padding, not only those that predict an answer.
    Sequences that share arrays (the roles of one sample) share them in the batch. Errors: `DataError` if there are no
    sequences, or if the lists differ in length or the images in shape.
    """
    if not sequences or len(sequences) != len(images):
        raise DataError(f"batch: {counted(len(sequences), 'sequence')} with the images of {len(images)}")
    length = max(len(sequence.input_ids_T) for sequence in sequences)
    input_ids_BT = np.full((len(sequences), length), pad_id, dtype=np.int64)
    attention_mask_BT = np.zeros((len(sequences), length), dtype=np.int64)
    for b, sequence in enumerate(sequences):
        input_ids_BT[b, : len(sequence.input_ids_T)] = sequence.input_ids_T
        attention_mask_BT[b, : len(sequence.input_ids_T)] = 1
    rows_N, targets_N, sequence_of_N = positions_of(sequences, length, positions)
    stacked, image_rows_P = _stack(sequences, images)
    has_bytes = stacked is not None and byte_values_CV is not None
    return Batch(
        input_ids_BT=torch.from_numpy(input_ids_BT),
        attention_mask_BT=torch.from_numpy(attention_mask_BT),
        images=stacked,
        prediction_rows_N=rows_N,
        target_ids_N=targets_N,
        sequence_of_N=sequence_of_N,
        keys=tuple(sequence.key for sequence in sequences),
        roles=tuple(sequence.role for sequence in sequences),
        image_rows_P=image_rows_P,
        byte_values_CV=torch.from_numpy(byte_values_CV) if has_bytes else None,
    )


def positions_of(
    sequences: Sequence[TokenizedSequence], length: int, positions: Positions
) -> tuple[Tensor, Tensor, Tensor]:
    """The predicting rows, their targets and their sequences, [N] each, in a batch padded to `length`."""
    found = [sequence.rows_and_targets(positions) for sequence in sequences]
    rows = [b * length + rows_N for b, (rows_N, _) in enumerate(found)]
    counts = [len(rows_N) for rows_N, _ in found]
    return (
        torch.from_numpy(np.concatenate(rows)),
        torch.from_numpy(np.concatenate([targets_N for _, targets_N in found])),
        torch.from_numpy(np.repeat(np.arange(len(sequences)), counts)),
    )


def _stack(
    sequences: Sequence[TokenizedSequence], images: Sequence[Sequence[NDArray[Any]]]
) -> tuple[Tensor | None, Tensor | None]:
    """The distinct images, and the image at each place if one has several places."""
    placed = [(sequence.key, image) for sequence, own in zip(sequences, images, strict=True) for image in own]
    if not placed:
        return None, None
    first = placed[0][1]
    for key, image in placed:
        if image.shape != first.shape:
            raise DataError(f"sample '{key}': an image of shape {image.shape} in a batch of {first.shape}")
    different = list({id(image): image for _, image in placed}.values())
    rows = {id(image): row for row, image in enumerate(different)}
    rows_P = None if len(different) == len(placed) else torch.tensor([rows[id(image)] for _, image in placed])
    return torch.from_numpy(_stacked(different)), rows_P


def _stacked(images: list[NDArray[Any]]) -> NDArray[Any]:
    """All images in one array: the array they are slices of, if they cover it in order, else a copy."""
    whole = images[0].base
    shape = (len(images), *images[0].shape)
    if isinstance(whole, np.ndarray) and whole.dtype == images[0].dtype and whole.shape == shape:
        starts = [image.ctypes.data for image in images]
        if whole.flags.c_contiguous and starts == [whole[number].ctypes.data for number in range(len(images))]:
            return whole
    return np.stack(images)
