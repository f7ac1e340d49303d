"""LLaVA: a CLIP tower, a projector and a language model; every picture takes the same number of tokens.

Letters: B sequences of a batch, T tokens of the longest, D hidden size, I images of the batch, H, W their pixels.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llavamod_offline.data.images import ImagePreprocessor
from llavamod_offline.data.template import Template
from llavamod_offline.models.checkpoint import load_config, load_llava, load_tokenizer, sequence_encoder
from teacher_cache.teachers.protocol import Picture

if TYPE_CHECKING:
    from llavamod_offline.data.sample import Sample
    from llavamod_offline.data.tokenise import Sequence as TokenSequence


class LlavaTeacher:
    """A folder of a LlavaForConditionalGeneration; see `protocol.Teacher`."""

    def __init__(self, folder: Path, template: Template, *, image_aspect: str, max_length: int) -> None:
        config = load_config(folder)
        self.folder = folder
        self.encoder = sequence_encoder(config, load_tokenizer(folder), template, max_length)
        self.preprocessor = ImagePreprocessor.from_checkpoint(folder, aspect=image_aspect)
        self.image_token_id: int | None = self.encoder.image_token_id
        self.head_rows = int(config.text_config.vocab_size)
        self.context_length = int(getattr(config.text_config, "max_position_embeddings", 0) or sys.maxsize)

    def encode(self, sample: Sample, role: str) -> TokenSequence:
        """Tokenise one role of a sample."""
        return self.encoder.encode(sample, role)

    def picture(self, encoded: bytes, *, name: str) -> Picture:
        """Decode and preprocess one picture: `pixel_values` [3, H, W] float32."""
        return Picture({"pixel_values": self.preprocessor.pixels(encoded, name=name)}, self.encoder.image_tokens)

    def describe_images(self) -> dict[str, Any]:
        """The processor's settings, and the tokens that a picture takes."""
        tokens = {"tokens": self.encoder.image_tokens, "token_id": self.image_token_id}
        return {**self.preprocessor.describe(), **tokens}

    def load(self, dtype: torch.dtype) -> Any:
        """Load the model."""
        return load_llava(self.folder, dtype=dtype)

    def hidden_states(self, model: Any, input_ids_BT: Tensor, mask_BT: Tensor, pictures: Sequence[Picture]) -> Tensor:
        """Run the model but for its head."""
        pixels_I3HW = None
        if pictures:
            stacked = np.stack([picture.inputs["pixel_values"] for picture in pictures])
            pixels_I3HW = torch.from_numpy(stacked).to(model.device, model.dtype)
        output = model.model(input_ids=input_ids_BT, attention_mask=mask_BT, pixel_values=pixels_I3HW, use_cache=False)
        hidden_BTD: Tensor = output.last_hidden_state
        return hidden_BTD
