"""The interface of a model family: how its images become tokens and inputs, and how it is loaded and run.

Shape suffixes: B sequences of a batch, T tokens of the longest, D hidden size, V ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llavamod_offline.data.encode.tokenize import SequenceEncoder, TokenizedSequence
from llavamod_offline.data.sample import Sample


@dataclass(frozen=True)
class SampleImage:
    """One image as model input: its named arrays, and the number of image tokens it takes in a sequence.

    Families whose processors prepare a sample's images together return all of them as one.
    """

    inputs: Mapping[str, NDArray[np.generic]]
    tokens: int


class Family(Protocol):
    """A checkpoint folder of one family, opened without its weights.

    `written`: an image in text, before its processor expands it; empty for a model without images. `image_token_id`:
    the id at an image's positions; None for such a model. `head_rows`: the rows of its LM
    head according to config.json; `context_length`: the most tokens it takes.
    """

    folder: Path
    written: str
    encoder: SequenceEncoder
    image_token_id: int | None
    head_rows: int
    context_length: int
    batches: bool

    def encode(self, sample: Sample, role: str) -> TokenizedSequence:
        """Tokenize one role of a sample, image tokens expanded, from image headers alone. Errors: `DataError`."""
        ...

    def images(self, sample: Sample) -> list[SampleImage]:
        """Decode and preprocess a sample's images, in order. Errors: `DataError` naming the sample."""
        ...

    def describe_images(self) -> dict[str, Any]:
        """Everything that determines pixels and image tokens, as JSON values for the fingerprint.

        `tokens`: how many an image takes, or `by size`; `token_id`: their id.
        """
        ...

    def load(self, dtype: torch.dtype, **settings: Any) -> Any:
        """Load the model in evaluation mode; `settings` go to `from_pretrained`. Errors: `ModelError`."""
        ...

    def model_inputs(
        self, sequences: Sequence[TokenizedSequence], images: Sequence[Sequence[SampleImage]], *, left: bool = False
    ) -> dict[str, Tensor]:
        """What the model's `forward` takes for a padded batch, on the CPU; `images` holds those of each sequence.

        Padding is on the right, or on the `left`.
        """
        ...


@runtime_checkable
class FeatureFamily(Family, Protocol):
    """A family whose image features replace embeddings and do nothing else; prompts may share rows."""

    def image_features(self, model: Any, images: Sequence[SampleImage]) -> list[Tensor]:
        """Run the vision tower and projector: [tokens, D] for each image, as they enter the decoder."""
        ...

    def position_ids(
        self, model: Any, input_ids_BT: Tensor, mask_BT: Tensor, images: Sequence[SampleImage]
    ) -> Tensor | None:
        """The decoder's positions, on the CPU like the arguments; None to let it count them itself.

        `images` are those of the whole batch, in the order of their tokens; padding is on the right.
        """
        ...
