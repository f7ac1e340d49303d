"""LLaVA students: images travel as bytes, and the tower and projector run once per image.

Shape suffixes: I images, H, W their pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llavamod_offline.data.encode.collate import Batch, collate
from llavamod_offline.data.encode.template import Template
from llavamod_offline.data.encode.tokenize import Positions, SequenceEncoder, TokenizedSequence
from llavamod_offline.data.image_aspect import ImageAspect
from llavamod_offline.data.images import ImagePreprocessor
from llavamod_offline.data.sample import Sample
from llavamod_offline.families.llava.checkpoint import sequence_encoder
from llavamod_offline.families.llava.export import save_llava
from llavamod_offline.families.llava.forward import LlavaForward
from llavamod_offline.families.students.protocol import ForwardPass

if TYPE_CHECKING:
    from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast


class LlavaStudent:
    """A LLaVA student, from a checkpoint or from parts; see `students.protocol.StudentFamily`."""

    def __init__(self, encoder: SequenceEncoder, preprocessor: ImagePreprocessor, *, processor_source: Path) -> None:
        self.encoder = encoder
        self.preprocessor = preprocessor
        self.processor_source = processor_source
        self.forward: ForwardPass = LlavaForward()
        self.image_tokens: int | None = encoder.image_tokens
        self.image_aspect: ImageAspect = preprocessor.aspect
        self.batches = True
        named, image = encoder.tokenizer.pad_token_id, encoder.image_token_id
        # Padding is masked; it may be any id but the image token.
        self.pad_id = int(named) if named is not None and named != image else int(image == 0)

    @classmethod
    def of(
        cls,
        config: LlavaConfig,
        tokenizer: PreTrainedTokenizerFast,
        template: Template,
        *,
        processor_source: Path,
        image_aspect: str,
        max_length: int,
    ) -> LlavaStudent:
        """The student of a configuration. Errors: `ModelError` if tokenizer or image processor do not fit."""
        images = ImagePreprocessor.from_checkpoint(processor_source, image_aspect)
        encoder = sequence_encoder(config, tokenizer, template, max_length)
        return cls(encoder, images, processor_source=processor_source)

    def encode(self, sample: Sample, role: str) -> TokenizedSequence:
        """Tokenize one role of a sample."""
        return self.encoder.encode(sample, role)

    def length(self, sample: Sample, role: str) -> int:
        """Count the tokens of one role of a sample."""
        return self.encoder.length(sample, role)

    def images(self, samples: Sequence[Sample]) -> list[list[NDArray[np.uint8]]]:
        """Decode each sample's images into slices of one array, so that a batch needs no copy."""
        whole_IHW3 = np.empty((sum(len(sample.images) for sample in samples), *self.preprocessor.size, 3), np.uint8)
        slices, own = iter(whole_IHW3), []
        for sample in samples:
            own.append([next(slices) for _ in sample.images])
            for number, (encoded, out_HW3) in enumerate(zip(sample.images, own[-1], strict=True)):
                self.preprocessor.pixel_bytes(encoded, out_HW3, name=f"{sample.key} image {number}")
        return own

    def collate(self, sequences: Sequence[TokenizedSequence], images: Sequence[Any], *, positions: Positions) -> Batch:
        """One batch; sequences that share images share them in the batch."""
        return collate(
            sequences,
            images,
            pad_id=self.pad_id,
            positions=positions,
            byte_values_CV=self.preprocessor.byte_values_3V,
        )

    def describe_images(self) -> dict[str, Any]:
        """The tokens of an image, and their id."""
        return {"tokens": self.encoder.image_tokens, "token_id": self.encoder.image_token_id}

    def save(
        self,
        model: LlavaForConditionalGeneration,
        folder: Path,
        *,
        state_dict: dict[str, Tensor] | None,
        card: str | None,
    ) -> None:
        """Write the checkpoint folder."""
        save_llava(
            model,
            folder,
            tokenizer=self.encoder.tokenizer,
            processor_source=self.processor_source,
            state_dict=state_dict,
            card=card,
            template=self.encoder.template,
            image_aspect=self.image_aspect,
        )
