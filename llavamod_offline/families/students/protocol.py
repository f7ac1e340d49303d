"""What training needs from a student's family.

Shape suffixes: B sequences of a batch, T tokens of the longest, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from llavamod_offline.data.encode.collate import Batch
from llavamod_offline.data.encode.tokenize import Positions, SequenceEncoder, TokenizedSequence
from llavamod_offline.data.image_aspect import ImageAspect
from llavamod_offline.data.sample import Sample


class ForwardPass(Protocol):
    """Runs a student up to its last hidden states; the losses apply the LM head."""

    def features(self, model: Any, batch: Batch, *, train_vision: bool) -> Tensor | None:
        """What several passes over the same images in one step share; None if each computes it itself."""
        ...

    def hidden_states(self, model: Any, batch: Batch, *, train_vision: bool, features: Tensor | None = None) -> Tensor:
        """The last hidden states [B, T, D], in the model's dtype. The tower is trained only with `train_vision`."""
        ...


class StudentFamily(Protocol):
    """A student's tokens, images, forward pass and export.

    `image_tokens`: how many tokens every image takes; None if that depends on its size. `image_aspect`: how images
    become square, or auto. `batches`: whether several sequences can be joined into a batch.
    """

    encoder: SequenceEncoder
    forward: ForwardPass
    image_tokens: int | None
    image_aspect: ImageAspect
    batches: bool

    def encode(self, sample: Sample, role: str) -> TokenizedSequence:
        """Tokenize one role of a sample. Errors: `DataError`, also if it is longer than the encoder's `max_length`."""
        ...

    def length(self, sample: Sample, role: str) -> int:
        """Count the tokens of one role, however many they are; images may be missing if `image_tokens` is known."""
        ...

    def images(self, samples: Sequence[Sample]) -> list[Any]:
        """Decode and prepare the images of a micro-batch: those of each sample, as `collate` takes them.

        Errors: `DataError` naming the sample.
        """
        ...

    def collate(self, sequences: Sequence[TokenizedSequence], images: Sequence[Any], *, positions: Positions) -> Batch:
        """One batch of sequences, padded on the right, given the images of each. Errors: `DataError`."""
        ...

    def describe_images(self) -> dict[str, Any]:
        """What decides the image tokens of a sequence, to compare with a cache's fingerprint."""
        ...

    def save(self, model: Any, folder: Path, *, state_dict: dict[str, Tensor] | None, card: str | None) -> None:
        """Write, atomically, a checkpoint folder that other tools load and prompt as in training.

        `state_dict` replaces the model's own tensors if an engine has sharded them. Errors: `ModelError`.
        """
        ...
