"""Students that take tokens and images together, by their processor and whole model: all families but LLaVA.

Shape suffixes: B sequences of a batch, T tokens of the longest, D hidden size, N positions of the batch.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from llavamod_offline.data.encode.collate import Batch, positions_of
from llavamod_offline.data.encode.tokenize import Positions, TokenizedSequence
from llavamod_offline.data.image_aspect import ImageAspect
from llavamod_offline.data.sample import IMAGE_PLACEHOLDER, Sample, Turn
from llavamod_offline.errors import DataError
from llavamod_offline.families.batch import image_mismatch
from llavamod_offline.families.probes import probe_images
from llavamod_offline.families.protocol import Family, SampleImage
from llavamod_offline.families.run import whole_hidden_states
from llavamod_offline.families.students.export import save_whole
from llavamod_offline.families.students.protocol import ForwardPass


class WholeForward:
    """The pass of a model's base model over everything its processor returns; see `protocol.ForwardPass`."""

    def features(self, model: Any, batch: Batch, *, train_vision: bool) -> Tensor | None:
        """None: images may do more than replace embeddings."""
        return None

    def hidden_states(self, model: Any, batch: Batch, *, train_vision: bool, features: Tensor | None = None) -> Tensor:
        """Run the student up to its LM head; a frozen tower needs no care, since nothing before it is trained."""
        text = {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_mask_BT}
        return whole_hidden_states(model, {**text, **batch.inputs})


class WholeStudent:
    """A student of an opened family, which takes sequences of any length; see `protocol.StudentFamily`.

    `fills`: every batch runs the tower, so a batch without images gets one in its padding. Nothing attends to it, so it
    only gives the tower and projector zero gradients: they need gradients if they are trained, and under ZeRO-3 all
    processes must gather their weights.
    """

    def __init__(self, family: Family, *, max_length: int, fills: bool) -> None:
        self.family = family
        self.encoder = copy.copy(family.encoder)
        self.encoder.max_length = max_length
        self.forward: ForwardPass = WholeForward()
        self.image_tokens: int | None = None
        self.image_aspect: ImageAspect = "auto"
        self.batches = family.batches
        self._filling = _filling(family) if fills else None

    def encode(self, sample: Sample, role: str) -> TokenizedSequence:
        """Tokenize one role of a sample, image tokens expanded, from image headers alone."""
        sequence, most = self.family.encode(sample, role), self.encoder.max_length
        if len(sequence.input_ids_T) > most:
            raise DataError(
                f"sample '{sample.key}' ({role}): {len(sequence.input_ids_T)} tokens, more than max_length {most}"
            )
        return sequence

    def length(self, sample: Sample, role: str) -> int:
        """Count the tokens of one role of a sample."""
        return len(self.family.encode(sample, role).input_ids_T)

    def images(self, samples: Sequence[Sample]) -> list[list[SampleImage]]:
        """Decode and preprocess the images of each sample."""
        return [self.family.images(sample) for sample in samples]

    def collate(self, sequences: Sequence[TokenizedSequence], images: Sequence[Any], *, positions: Positions) -> Batch:
        """One batch of everything that the model takes."""
        for sequence, own in zip(sequences, images, strict=True):
            if problem := image_mismatch(sequence.input_ids_T, own, self.family.image_token_id):
                raise DataError(f"sample '{sequence.key}' ({sequence.role}): {problem}")
        given, shown = list(sequences), list(images)
        shortest = min(range(len(given)), key=lambda row: len(given[row].input_ids_T))
        length = len(given[shortest].input_ids_T)
        filled = self._filling is not None and not any(images)
        if filled:
            assert self._filling is not None
            extra, shown[shortest] = self._filling
            ids_T = np.concatenate([given[shortest].input_ids_T, extra.input_ids_T])
            given[shortest] = replace(given[shortest], input_ids_T=ids_T)
        inputs = self.family.model_inputs(given, shown)
        input_ids_BT, mask_BT = inputs.pop("input_ids"), inputs.pop("attention_mask")
        if filled:
            mask_BT[shortest, length:] = 0
        rows_N, targets_N, sequence_of_N = positions_of(sequences, input_ids_BT.shape[1], positions)
        return Batch(
            input_ids_BT=input_ids_BT,
            attention_mask_BT=mask_BT,
            images=None,
            prediction_rows_N=rows_N,
            target_ids_N=targets_N,
            sequence_of_N=sequence_of_N,
            keys=tuple(sequence.key for sequence in sequences),
            roles=tuple(sequence.role for sequence in sequences),
            inputs=inputs,
        )

    def describe_images(self) -> dict[str, Any]:
        """The processor's settings."""
        return self.family.describe_images()

    def save(self, model: Any, folder: Path, *, state_dict: dict[str, Tensor] | None, card: str | None) -> None:
        """Write the checkpoint folder."""
        save_whole(model, folder, family=self.family, state_dict=state_dict, card=card)


def _filling(family: Family) -> tuple[TokenizedSequence, list[SampleImage]]:
    """A conversation with an image."""
    content = io.BytesIO()
    probe_images()[0].save(content, "PNG")
    turns = (Turn("user", IMAGE_PLACEHOLDER), Turn("assistant", "-"))
    sample = Sample("filling", turns, (content.getvalue(),), ("png",))
    return family.encode(sample, "response"), family.images(sample)
