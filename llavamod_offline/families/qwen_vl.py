"""Qwen2-VL and Qwen2.5-VL: images of any size, start and end tokens around them, positions in three dimensions.

Shape suffixes: B sequences of a batch, T tokens of the longest, D hidden size, P patches of one image or of all of
them, C numbers of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llavamod_offline.data.encode.template import Template
from llavamod_offline.data.encode.tokenize import SequenceEncoder, TokenizedSequence
from llavamod_offline.data.images import decode_image, image_size, pad_to_square
from llavamod_offline.data.sample import Sample
from llavamod_offline.errors import DataError, ModelError, first_line
from llavamod_offline.families import folder as folders
from llavamod_offline.families.batch import tensors, text_inputs
from llavamod_offline.families.protocol import SampleImage
from llavamod_offline.models.checkpoint import load_tokenizer, load_weights, read_json

_PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")
_IMAGE, _START, _END = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"


class QwenVlFamily:
    """A folder of a Qwen2-VL or Qwen2.5-VL; see `protocol.Family`.

    `image_aspect` auto leaves images to the processor, which resizes them to a whole number of merged patches; pad
    first pads them to squares.
    """

    written = f"{_START}{_IMAGE}{_END}"

    def __init__(self, folder: Path, template: Template, *, image_aspect: str, max_length: int) -> None:
        from transformers import Qwen2_5_VLConfig, Qwen2VLConfig
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.folder = folder
        self._newer = read_json(folder, "config.json")["model_type"] == "qwen2_5_vl"
        config = folders.read_config(Qwen2_5_VLConfig if self._newer else Qwen2VLConfig, folder)
        tokenizer = load_tokenizer(folder)
        image = folders.token_id(tokenizer, _IMAGE, config.image_token_id, "image_token_id")
        start = folders.token_id(tokenizer, _START, config.vision_start_token_id, "vision_start_token_id")
        end = folders.token_id(tokenizer, _END, config.vision_end_token_id, "vision_end_token_id")
        self.encoder = SequenceEncoder(
            tokenizer,
            template,
            image_token_id=image,
            image_tokens=0,  # `encode` counts each image's
            max_length=max_length,
            image_frame=((start,), (end,)),
        )
        self.processor = folders.read_processor(Qwen2VLImageProcessorPil, _PROCESSORS, folder)
        self._check_patches(config.vision_config)
        self.padded = folders.own_aspect(image_aspect, "Qwen-VL")
        self.fill = tuple(int(mean * 255) for mean in self.processor.image_mean)
        self.image_token_id: int | None = image
        self.head_rows = int(config.text_config.vocab_size)
        self.context_length = folders.context_length(config.text_config)
        self.batches = True

    def encode(self, sample: Sample, role: str) -> TokenizedSequence:
        """Tokenize one role of a sample."""
        counts = [self._tokens(image_size(image, name=sample.key), sample) for image in sample.images]
        return self.encoder.encode(sample, role, [self.encoder.image(count) for count in counts])

    def images(self, sample: Sample) -> list[SampleImage]:
        """Decode and preprocess: `pixel_values` [P, C] float32 of each, `image_grid_thw` [3] its patches."""
        made = []
        for encoded in sample.images:
            image = decode_image(encoded, name=sample.key)
            if self.padded:
                image = pad_to_square(image, self.fill)
            with folders.preparing(sample):
                found = self.processor([image], return_tensors="np")
            grid_3 = np.asarray(found["image_grid_thw"][0], np.int64)
            pixels_PC = folders.pixel_array(found["pixel_values"], sample)
            tokens = int(grid_3.prod()) // int(self.processor.merge_size) ** 2
            made.append(SampleImage({"pixel_values": pixels_PC, "image_grid_thw": grid_3}, tokens))
        return made

    def describe_images(self) -> dict[str, Any]:
        """The processor's settings; an image's tokens depend on its size."""
        switches = ("do_resize", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "size")
        names = (*switches, "patch_size", "temporal_patch_size", "merge_size", "resample")
        return folders.describe_processor(self.processor, names, padded=self.padded, token_id=self.image_token_id)

    def load(self, dtype: torch.dtype, **settings: Any) -> Any:
        """Load the model."""
        from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLForConditionalGeneration

        model_class = Qwen2_5_VLForConditionalGeneration if self._newer else Qwen2VLForConditionalGeneration
        return load_weights(model_class, self.folder, dtype=dtype, **settings)

    def model_inputs(
        self, sequences: Sequence[TokenizedSequence], images: Sequence[Sequence[SampleImage]], *, left: bool = False
    ) -> dict[str, Tensor]:
        """Tokens, which of them are images, and the patches of all images."""
        text = text_inputs(sequences, pad=int(self.image_token_id == 0), left=left)
        text["mm_token_type_ids"] = (text["input_ids"] == self.image_token_id).astype(np.int64)
        arrays = [image.inputs for own in images for image in own]
        if not arrays:
            return tensors(text)
        patches_PC = np.concatenate([array["pixel_values"] for array in arrays])
        grids = np.stack([array["image_grid_thw"] for array in arrays])
        return tensors(text | {"pixel_values": patches_PC, "image_grid_thw": grids})

    def image_features(self, model: Any, images: Sequence[SampleImage]) -> list[Tensor]:
        """Run the tower with its merger over the patches of all images, one after another."""
        patches_PC = np.concatenate([image.inputs["pixel_values"] for image in images])
        pixels_PC = torch.from_numpy(patches_PC).to(model.device, model.dtype)
        found = model.model.get_image_features(pixels_PC, _grids(images).to(model.device), return_dict=True)
        return list(found.pooler_output)

    def position_ids(
        self, model: Any, input_ids_BT: Tensor, mask_BT: Tensor, images: Sequence[SampleImage]
    ) -> Tensor | None:
        """M-RoPE: time, height and width of each token, [3, B, T] (Qwen2-VL, arXiv 2409.12191, section 2.1)."""
        types_BT = torch.eq(input_ids_BT, self.encoder.image_token_id).int()
        grids = _grids(images) if images else None
        found: Tensor = model.model.get_rope_index(
            input_ids_BT, mm_token_type_ids=types_BT, image_grid_thw=grids, attention_mask=mask_BT
        )[0]
        return found

    def _tokens(self, size: tuple[int, int], sample: Sample) -> int:
        """The tokens of an image of this width and height."""
        width, height = (max(size), max(size)) if self.padded else size
        try:
            patches = self.processor.get_number_of_image_patches(height, width, {})
        except ValueError as error:
            raise DataError(f"sample '{sample.key}': {width}×{height} pixels: {first_line(error)}") from error
        return int(patches) // int(self.processor.merge_size) ** 2

    def _check_patches(self, vision: Any) -> None:
        """Refuse a processor whose patches differ from the tower's."""
        names = (("patch_size",) * 2, ("temporal_patch_size",) * 2, ("merge_size", "spatial_merge_size"))
        for mine, theirs in names:
            found, expected = getattr(self.processor, mine), getattr(vision, theirs)
            if found != expected:
                raise ModelError(
                    f"{self.folder}: the image processor's {mine} is {found}, but vision_config's {theirs} is "
                    f"{expected}: copy the preprocessor_config.json that belongs to the model"
                )


def _grids(images: Sequence[SampleImage]) -> Tensor:
    return torch.from_numpy(np.stack([image.inputs["image_grid_thw"] for image in images]).astype(np.int64))
