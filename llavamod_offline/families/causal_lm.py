"""Language models without images: text-only samples are captured, samples with images are rejected."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llavamod_offline.data.encode.chat_template import words_as
from llavamod_offline.data.encode.template import Template
from llavamod_offline.data.encode.tokenize import SequenceEncoder, TokenizedSequence
from llavamod_offline.data.sample import Sample
from llavamod_offline.errors import DataError
from llavamod_offline.families.batch import tensors, text_inputs
from llavamod_offline.families.folder import context_length, read_config
from llavamod_offline.families.protocol import SampleImage
from llavamod_offline.models.checkpoint import load_tokenizer, load_weights
from llavamod_offline.plural import counted


class CausalLmFamily:
    """A folder of any causal language model that transformers knows; see `protocol.Family`."""

    written = ""

    def __init__(self, folder: Path, template: Template, *, image_aspect: str, max_length: int) -> None:
        from transformers import AutoConfig

        config = read_config(AutoConfig, folder)
        self.folder = folder
        tokenizer = load_tokenizer(folder)
        self.encoder = SequenceEncoder(
            tokenizer,
            template,
            image_token_id=-1,
            image_tokens=0,
            max_length=max_length,
            add_start=not words_as(tokenizer, template),  # a tokenizer adds nothing to its chat template's output
        )
        self.image_token_id: int | None = None
        self.head_rows = int(config.vocab_size)
        self.context_length = context_length(config)
        self.batches = True

    def encode(self, sample: Sample, role: str) -> TokenizedSequence:
        """Tokenize one role of a sample. Errors: `DataError` if it has images."""
        if sample.images:
            raise DataError(
                f"sample '{sample.key}' ({role}): it has {counted(len(sample.images), 'image')}, and the teacher is a "
                "language model without images"
            )
        return self.encoder.encode(sample, role)

    def images(self, sample: Sample) -> list[SampleImage]:
        """None: `encode` rejects samples with images."""
        return []

    def describe_images(self) -> dict[str, Any]:
        """No images, no tokens."""
        return {"tokens": 0, "token_id": None}

    def load(self, dtype: torch.dtype, **settings: Any) -> Any:
        """Load the model."""
        from transformers import AutoModelForCausalLM

        return load_weights(AutoModelForCausalLM, self.folder, dtype=dtype, **settings)

    def model_inputs(
        self, sequences: Sequence[TokenizedSequence], images: Sequence[Sequence[SampleImage]], *, left: bool = False
    ) -> dict[str, Tensor]:
        """Tokens."""
        return tensors(text_inputs(sequences, pad=0, left=left))

    def image_features(self, model: Any, images: Sequence[SampleImage]) -> list[Tensor]:
        """None: there are no images."""
        return []

    def position_ids(
        self, model: Any, input_ids_BT: Tensor, mask_BT: Tensor, images: Sequence[SampleImage]
    ) -> Tensor | None:
        """None: the decoder counts positions itself."""
        return None
