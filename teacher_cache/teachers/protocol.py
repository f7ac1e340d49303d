"""What a family of checkpoints knows: how its pictures become tokens and inputs, and how it is loaded and run.

Letters: B sequences of a batch, T tokens of the longest, D hidden size, V ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llavamod_offline.data.sample import Sample
from llavamod_offline.data.tokenise import Sequence as TokenSequence
from llavamod_offline.data.tokenise import SequenceEncoder


@dataclass(frozen=True)
class Picture:
    """One picture as the model takes it: its named arrays, and the number of image tokens it takes in a sequence."""

    inputs: Mapping[str, NDArray[np.generic]]
    tokens: int


class Teacher(Protocol):
    """A checkpoint folder of one family, opened without its weights.

    `image_token_id`: the id that stands at an image's positions; None where the model sees no images. `head_rows`: the
    rows of its head as its configuration says; `context_length`: the most tokens it takes.
    """

    folder: Path
    encoder: SequenceEncoder
    image_token_id: int | None
    head_rows: int
    context_length: int

    def encode(self, sample: Sample, role: str) -> TokenSequence:
        """Tokenise one role of a sample, its pictures' tokens expanded. Errors: `DataError` naming the sample."""
        ...

    def picture(self, encoded: bytes, *, name: str) -> Picture:
        """Decode and preprocess one picture. Errors: `DataError` naming it."""
        ...

    def describe_images(self) -> dict[str, Any]:
        """Everything that decides pixels and image tokens, as JSON values, for the fingerprint."""
        ...

    def load(self, dtype: torch.dtype) -> Any:
        """Load the model in evaluation mode on the CPU. Errors: `ModelError` if weights and configuration differ."""
        ...

    def hidden_states(self, model: Any, input_ids_BT: Tensor, mask_BT: Tensor, pictures: Sequence[Picture]) -> Tensor:
        """Run the model but for its head: the last hidden states, [B, T, D].

        `pictures` are those of the whole batch, in the order of their tokens; padding stands at the right.
        """
        ...
