"""LLaVA: a CLIP tower, a projector and a language model; every image takes the same number of tokens.

Shape suffixes: D hidden size, I images, H, W their pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llavamod_offline.data.encode.template import Template
from llavamod_offline.data.encode.tokenize import TokenizedSequence
from llavamod_offline.data.images import ImagePreprocessor
from llavamod_offline.data.sample import IMAGE_PLACEHOLDER, Sample
from llavamod_offline.families.batch import tensors, text_inputs
from llavamod_offline.families.folder import context_length, pixel_array, preparing
from llavamod_offline.families.llava.checkpoint import load_config, load_llava, sequence_encoder
from llavamod_offline.families.protocol import SampleImage
from llavamod_offline.models.checkpoint import load_tokenizer


class LlavaFamily:
    """A folder of a LlavaForConditionalGeneration; see `protocol.Family`.

    `image_aspect` auto is what the folder states, as our students' folders do, or else pad.
    """

    written = IMAGE_PLACEHOLDER

    def __init__(self, folder: Path, template: Template, *, image_aspect: str, max_length: int) -> None:
        config = load_config(folder)
        self.folder = folder
        self.encoder = sequence_encoder(config, load_tokenizer(folder), template, max_length)
        self.preprocessor = ImagePreprocessor.from_checkpoint(folder, aspect=image_aspect)
        self.image_token_id: int | None = self.encoder.image_token_id
        self.head_rows = int(config.text_config.vocab_size)
        self.context_length = context_length(config.text_config)
        self.batches = True

    def encode(self, sample: Sample, role: str) -> TokenizedSequence:
        """Tokenize one role of a sample."""
        return self.encoder.encode(sample, role)

    def images(self, sample: Sample) -> list[SampleImage]:
        """Decode and preprocess: `pixel_values` [3, H, W] float32."""
        made = []
        for image in sample.images:
            with preparing(sample):
                pixels_3HW = pixel_array(self.preprocessor.pixels(image, name=sample.key), sample)
            made.append(SampleImage({"pixel_values": pixels_3HW}, self.encoder.image_tokens))
        return made

    def describe_images(self) -> dict[str, Any]:
        """The processor's settings, and the tokens of an image."""
        tokens = {"tokens": self.encoder.image_tokens, "token_id": self.image_token_id}
        return {**self.preprocessor.describe(), **tokens}

    def load(self, dtype: torch.dtype, **settings: Any) -> Any:
        """Load the model."""
        return load_llava(self.folder, dtype=dtype, **settings)

    def model_inputs(
        self, sequences: Sequence[TokenizedSequence], images: Sequence[Sequence[SampleImage]], *, left: bool = False
    ) -> dict[str, Tensor]:
        """Tokens, and the pixels of all images."""
        text = text_inputs(sequences, pad=int(self.image_token_id == 0), left=left)
        pixels = [image.inputs["pixel_values"] for own in images for image in own]
        return tensors(text | ({"pixel_values": np.stack(pixels)} if pixels else {}))

    def image_features(self, model: Any, images: Sequence[SampleImage]) -> list[Tensor]:
        """Run tower and projector."""
        stacked = np.stack([image.inputs["pixel_values"] for image in images])
        pixels_I3HW = torch.from_numpy(stacked).to(model.device, model.dtype)
        return list(model.model.get_image_features(pixel_values=pixels_I3HW, return_dict=True).pooler_output)

    def position_ids(
        self, model: Any, input_ids_BT: Tensor, mask_BT: Tensor, images: Sequence[SampleImage]
    ) -> Tensor | None:
        """None: the decoder counts positions itself."""
        return None
