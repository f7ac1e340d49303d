"""LLaVA-OneVision: a single image is cut into tiles on the grid that fits it best; several are shrunk to one tile each.

A single image takes the tokens of the whole image in one tile, and those of its tiles without padding, with a newline
token after each row; if there are too many, they are shrunk. Each of several images takes a tile's tokens and a
newline.
Shape suffixes: D hidden size, S tiles of an image, H, W a tile's pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llavamod_offline.data.encode.template import Template
from llavamod_offline.data.encode.tokenize import SequenceEncoder, TokenizedSequence
from llavamod_offline.data.images import decode_image, image_size, pad_to_square
from llavamod_offline.data.sample import IMAGE_PLACEHOLDER, Sample
from llavamod_offline.errors import DataError, ModelError
from llavamod_offline.families import folder as folders
from llavamod_offline.families.batch import joined, tensors, text_inputs
from llavamod_offline.families.protocol import SampleImage
from llavamod_offline.models.checkpoint import load_tokenizer, load_weights

_PROCESSORS = ("LlavaOnevisionImageProcessor", "LlavaOnevisionImageProcessorFast", "LlavaOnevisionImageProcessorPil")


class LlavaOnevisionFamily:
    """A folder of a LlavaOnevisionForConditionalGeneration; see `protocol.Family`.

    `image_aspect` auto leaves images to the processor; pad first pads them to squares.
    """

    written = IMAGE_PLACEHOLDER

    def __init__(self, folder: Path, template: Template, *, image_aspect: str, max_length: int) -> None:
        from transformers import LlavaOnevisionConfig
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )

        self.folder = folder
        config = folders.read_config(LlavaOnevisionConfig, folder)
        tokenizer = load_tokenizer(folder)
        image = folders.token_id(tokenizer, "<image>", config.image_token_index, "image_token_index")
        # `encode` counts the image tokens.
        self.encoder = SequenceEncoder(tokenizer, template, image_token_id=image, image_tokens=0, max_length=max_length)
        self.processor = folders.read_processor(LlavaOnevisionImageProcessorPil, _PROCESSORS, folder)
        self.padded = folders.own_aspect(image_aspect, "LLaVA-OneVision")
        self.fill = tuple(int(mean * 255) for mean in self.processor.image_mean)
        self.tile = int(config.vision_config.image_size)
        self.side: int = config.vision_config.image_size // config.vision_config.patch_size
        self._check_tiles(config)
        self.most_tiles = self._most_tiles(config.vision_aspect_ratio)
        self.image_token_id: int | None = image
        self.head_rows = int(config.text_config.vocab_size)
        self.context_length = folders.context_length(config.text_config)
        self.batches = True

    def encode(self, sample: Sample, role: str) -> TokenizedSequence:
        """Tokenize one role of a sample."""
        sizes = [image_size(image, name=sample.key) for image in sample.images]
        images = [self.encoder.image(self._tokens(size, sample)) for size in sizes]
        return self.encoder.encode(sample, role, images)

    def images(self, sample: Sample) -> list[SampleImage]:
        """Decode and preprocess: `pixel_values` [S, 3, H, W] float32 of each, `image_size` [2] (height, width)."""
        images = [decode_image(encoded, name=sample.key) for encoded in sample.images]
        if self.padded:
            images = [pad_to_square(image, self.fill) for image in images]
        if not images:
            return []
        with folders.preparing(sample):
            found = self.processor([images], do_pad=False)
        made = []
        for image, pixels_S3HW in zip(images, found["pixel_values"], strict=True):
            width, height = image.size
            size_2 = np.array([height, width], np.int64)
            pixels_S3HW = folders.pixel_array(pixels_S3HW, sample)
            tokens = self._tokens((width, height), sample)
            made.append(SampleImage({"pixel_values": pixels_S3HW, "image_size": size_2}, tokens))
        return made

    def describe_images(self) -> dict[str, Any]:
        """The processor's settings; an image's tokens depend on its size and whether it is the only one."""
        names = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor")
        means = ("do_normalize", "image_mean", "image_std", "image_grid_pinpoints")
        about = folders.describe_processor(
            self.processor, (*names, *means), padded=self.padded, token_id=self.image_token_id
        )
        return {**about, "most_tiles": self.most_tiles}

    def load(self, dtype: torch.dtype, **settings: Any) -> Any:
        """Load the model."""
        from transformers import LlavaOnevisionForConditionalGeneration

        return load_weights(LlavaOnevisionForConditionalGeneration, self.folder, dtype=dtype, **settings)

    def model_inputs(
        self, sequences: Sequence[TokenizedSequence], images: Sequence[Sequence[SampleImage]], *, left: bool = False
    ) -> dict[str, Tensor]:
        """Tokens, the tiles of all images, their sizes, and each sequence's number of images."""
        text = text_inputs(sequences, pad=int(self.image_token_id == 0), left=left)
        arrays = [image.inputs for own in images for image in own]
        if not arrays:
            return tensors(text)
        tiles = [{"pixel_values": array["pixel_values"][None]} for array in arrays]
        sizes = np.stack([array["image_size"] for array in arrays])
        counts = np.array([len(own) for own in images if own])
        return tensors(text | joined(tiles) | {"image_sizes": sizes, "batch_num_images": counts})

    def image_features(self, model: Any, images: Sequence[SampleImage]) -> list[Tensor]:
        """Run the tower and projector over the tiles, and join those of each image, with newlines."""
        found: dict[int, Tensor] = {}
        alone = [len(image.inputs["pixel_values"]) > 1 for image in images]
        for kind in (True, False):
            numbers = [number for number, single in enumerate(alone) if single == kind]
            if not numbers:
                continue
            inputs = [images[number].inputs for number in numbers]
            tiles = torch.from_numpy(np.concatenate([image["pixel_values"] for image in inputs]))
            sizes = torch.from_numpy(np.stack([image["image_size"] for image in inputs]))
            features = model.model.get_image_features(
                tiles.to(model.device, model.dtype),
                sizes,
                batch_num_images=None if kind else [max(len(numbers), 2)],  # more than one: a tile each
                return_dict=True,
            ).pooler_output
            found |= dict(zip(numbers, features, strict=True))
        return [found[number] for number in range(len(images))]

    def position_ids(
        self, model: Any, input_ids_BT: Tensor, mask_BT: Tensor, images: Sequence[SampleImage]
    ) -> Tensor | None:
        """None: the decoder counts positions itself."""
        return None

    def _tokens(self, size: tuple[int, int], sample: Sample) -> int:
        """The tokens of an image of this width and height in a sample."""
        from transformers.image_processing_utils import select_best_resolution

        width, height = (max(size), max(size)) if self.padded else size
        own, side = self.side**2, self.side
        if len(sample.images) > 1:
            return own + 1
        best = select_best_resolution((height, width), self.processor.image_grid_pinpoints)
        if best is None:
            raise DataError(f"sample '{sample.key}': {width}×{height} pixels fit no grid of tiles: crop the image")
        rows, columns = (side * (int(length) // self.tile) for length in best)
        # The following rounds as the model's `unpad_image` does.
        if width / height > columns / rows:
            rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
        ratio = math.sqrt(rows * columns / (self.most_tiles * side**2))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
        return own + rows * columns + rows

    def _most_tiles(self, rule: str) -> int:
        """The largest number of tiles whose features an image keeps: n of `anyres_max_n`."""
        number = rule.removeprefix("anyres_max_")
        if not number.isdecimal() or int(number) < 1:
            raise ModelError(
                f"{self.folder}/config.json: vision_aspect_ratio is '{rule}', expected anyres_max_9 or similar"
            )
        return int(number)

    def _check_tiles(self, config: Any) -> None:
        """Refuse a processor whose tiles differ from the tower's."""
        size = folders.plain(self.processor.size)
        sides = {size.get("height"), size.get("width")} if "height" in size else {size.get("shortest_edge")}
        grid = folders.plain(self.processor.image_grid_pinpoints)
        if sides != {self.tile} or grid != folders.plain(config.image_grid_pinpoints):
            raise ModelError(
                f"{self.folder}: the image processor's size or image_grid_pinpoints are not those of config.json "
                f"(tiles of {self.tile} pixels): copy the preprocessor_config.json that belongs to the model"
            )
        if config.vision_feature_select_strategy != "full":
            raise ModelError(
                f"{self.folder}/config.json: vision_feature_select_strategy is "
                f"'{config.vision_feature_select_strategy}': expected 'full', since the tower has no class token"
            )
