"""Put the tokens and images of several sequences into one batch, as models take them.

Shape suffixes: B sequences of a batch, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llavamod_offline.data.encode.tokenize import Ids, TokenizedSequence
from llavamod_offline.families.protocol import SampleImage


def text_inputs(sequences: Sequence[TokenizedSequence], *, pad: int, left: bool) -> dict[str, NDArray[np.int64]]:
    """Token ids, padded with `pad` on the right or the `left`, and the attention mask."""
    ids = [sequence.input_ids_T for sequence in sequences]
    masks = [np.ones_like(one) for one in ids]
    return {"input_ids": padded(ids, pad, left=left), "attention_mask": padded(masks, 0, left=left)}


def padded(rows: Sequence[NDArray[np.int64]], value: int, *, left: bool) -> NDArray[np.int64]:
    """Pad rows to the longest: [B, T]."""
    found_BT = np.full((len(rows), max(map(len, rows))), value, np.int64)
    for row_T, into_T in zip(rows, found_BT, strict=True):
        into_T[len(into_T) - len(row_T) if left else 0 :][: len(row_T)] = row_T
    return found_BT


def joined(samples: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """The arrays of several samples, concatenated; their other dimensions are padded with zeros to the largest."""
    found: dict[str, NDArray[Any]] = {}
    for name in dict.fromkeys(name for sample in samples for name in sample):
        arrays = [sample[name] for sample in samples if name in sample]
        largest = np.max([array.shape[1:] for array in arrays], axis=0).astype(int)
        found[name] = np.concatenate(
            [
                np.pad(
                    array, [(0, 0), *((0, int(most - own)) for own, most in zip(array.shape[1:], largest, strict=True))]
                )
                for array in arrays
            ]
        )
    return found


def as_array(value: Any) -> NDArray[Any]:
    """A processor's output as an array; bfloat16, which numpy lacks, becomes float32."""
    if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
        value = value.float()
    return np.asarray(value)


def tensors(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """Arrays as tensors."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def image_mismatch(ids_T: Ids, images: Sequence[SampleImage], image_token_id: int | None) -> str | None:
    """Why images cannot take the places of their tokens; None if they can."""
    expected, found = sum(image.tokens for image in images), int((ids_T == image_token_id).sum())
    if found == expected:
        return None
    return f"its images take {expected} tokens, its sequence has {found}: an image's header gives a wrong size"
