"""Any image-text model of transformers, by its own processor and whole forward pass.

The processor expands images into tokens and prepares their arrays; everything it returns goes into the model, so that
whatever a family does with images, their positions or their tokens' attention happens here as elsewhere. On opening,
ids and arrays are compared with the processor's own on a few conversations (`probes`).

Shape suffixes: B sequences of a batch, T tokens of the longest.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from llavamod_offline.data.encode.chat_template import choose_template
from llavamod_offline.data.encode.template import AUTO, ROLES, Segment, Template
from llavamod_offline.data.encode.tokenize import ImageTokens, SequenceEncoder, TokenizedSequence
from llavamod_offline.data.images import DECODER, decode_image, image_size, pad_to_square
from llavamod_offline.data.sample import Sample
from llavamod_offline.errors import DataError, ModelError
from llavamod_offline.families import folder as folders
from llavamod_offline.families.batch import as_array, joined, padded, tensors, text_inputs
from llavamod_offline.families.image_wording import TokenWriter, written_image
from llavamod_offline.families.probes import check_family, probe
from llavamod_offline.families.processor import load_processor
from llavamod_offline.families.protocol import SampleImage
from llavamod_offline.models.checkpoint import load_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PALIGEMMA = "paligemma"  # a model type, and the name of its template
_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels", "text_replacement_offsets")
_SIZES_KEPT = 4096  # how many image sizes have their tokens cached


class ImageTextFamily:
    """A folder of any `AutoModelForImageTextToText` that transformers has code for; see `protocol.Family`.

    `image_aspect` auto leaves images to the processor; pad first pads them to squares. `batches`: whether the arrays of
    several samples can be joined; else each sequence runs alone.
    Errors: `ModelError` for a processor or tokenizer that does not belong to the model, or that cannot be reproduced.
    """

    def __init__(self, folder: Path, template: Template | str, *, image_aspect: str, max_length: int) -> None:
        from transformers import AutoConfig

        config = folders.read_config(AutoConfig, folder)
        text_config = config.get_text_config()
        self.folder = folder
        self.model_type = str(config.model_type)
        if getattr(config, "is_encoder_decoder", False) or getattr(text_config, "is_encoder_decoder", False):
            raise ModelError(f"{folder}: {self.model_type} is an encoder-decoder: choose a teacher that is a decoder")
        self.processor = load_processor(folder, config)
        if getattr(self.processor, "image_processor", None) is None:
            raise ModelError(f"{folder}: {type(self.processor).__name__} takes only videos: {folders.OTHER}")
        self.tensors = "np" if type(self.processor.image_processor).__name__.endswith("Pil") else "pt"
        # A copy: threads use the processor's own, with other settings.
        tokenizer = copy.deepcopy(self.processor.tokenizer)
        image_token = getattr(self.processor, "image_token", None)
        if image_token is None:
            raise ModelError(f"{folder}: {type(self.processor).__name__} has no token for images: {folders.OTHER}")
        self.image_token_id: int | None = _embedded_id(config, self.processor, folder)
        self.written = written_image(tokenizer, image_token, config)
        # PaliGemma has no chat template; all tokens of its prompt attend to one another.
        self.sees_prompt_whole = self.model_type == PALIGEMMA
        if self.sees_prompt_whole and template in (AUTO, PALIGEMMA):
            template = paligemma_template(tokenizer)
        elif isinstance(template, str):
            template = choose_template(template, lambda: tokenizer, image=self.written)
        self.encoder = SequenceEncoder(
            tokenizer, template, image_token_id=self.image_token_id, image_tokens=0, max_length=sys.maxsize
        )
        self.head_rows = int(text_config.vocab_size)
        self.context_length = folders.context_length(text_config)
        self.padded = folders.own_aspect(image_aspect, self.model_type)
        means = getattr(self.processor.image_processor, "image_mean", None) or (0.5, 0.5, 0.5)
        self.fill = tuple(int(mean * 255) for mean in means)
        self._write = TokenWriter(tokenizer, self.written, image_token)
        self._images_of = lru_cache(_SIZES_KEPT)(self._write_sizes)
        self.text_fields: dict[str, bool] = {}  # token type arrays that the model takes, and whether they mark images
        self.batches, self.needs_images = True, False
        check_family(self)
        self.encoder.max_length = max_length

    def encode(self, sample: Sample, role: str) -> TokenizedSequence:
        """Tokenize one role of a sample."""
        images: Sequence[ImageTokens] = ()
        if sample.images:
            sizes = tuple(image_size(image, name=sample.key) for image in sample.images)
            with folders.preparing(sample):
                images = self._images_of(sizes)
        elif self.needs_images:
            raise DataError(f"sample '{sample.key}' ({role}): it has no image, which {self.model_type} needs")
        sequence = self.encoder.encode(sample, role, images)
        if self.sees_prompt_whole and (np.diff(sequence.supervised_N) > 1).any():
            raise DataError(
                f"sample '{sample.key}' ({role}): it has several answers, and {self.model_type} takes one: split it"
            )
        return sequence

    def images(self, sample: Sample) -> list[SampleImage]:
        """Decode and preprocess all images of a sample together: the arrays that the processor gives for them."""
        if not sample.images:
            return []
        images = [decode_image(encoded, name=sample.key) for encoded in sample.images]
        with folders.preparing(sample):
            arrays, written = self.process(images)
            for array in arrays.values():
                if array.dtype == np.float32:
                    folders.pixel_array(array, sample)
        return [SampleImage(arrays, sum(self._embedded(image) for image in written))]

    def process(self, images: Sequence[Image.Image]) -> tuple[dict[str, NDArray[Any]], list[ImageTokens]]:
        """The arrays of a sample's images, and their tokens."""
        token = self.processor.image_token
        if self.sees_prompt_whole:
            return self._process_prompt(images)
        found = self.processor(
            text=[token * len(images)],
            images=[[self.shaped(image) for image in images]],
            return_text_replacement_offsets=True,
            return_tensors=self.tensors,
        )
        offsets = found.get("text_replacement_offsets")
        if offsets is None and len(images) == 1:  # an older processor
            ids_T = np.asarray(found["input_ids"][0])
            return self.arrays(found), [ImageTokens(ids_T[len(self.encoder.start_ids) :])]
        if offsets is None:
            return self.arrays(found), [self.process([image])[1][0] for image in images]
        return self.arrays(found), [self._write(place["replacement"]) for place in offsets[0]]

    def _process_prompt(self, images: Sequence[Image.Image]) -> tuple[dict[str, NDArray[Any]], list[ImageTokens]]:
        """Like `process`, for PaliGemma, which puts the start token of the text after the last image."""
        token, start = self.processor.image_token, self.processor.tokenizer.bos_token_id
        shown = [self.shaped(image) for image in images]
        found = self.processor(text=[token * len(images)], images=[shown], return_tensors=self.tensors)
        ids = np.full(self.processor.image_seq_length, self.image_token_id, np.int64)
        return self.arrays(found), [*[ImageTokens(ids)] * (len(images) - 1), ImageTokens(np.append(ids, start))]

    def shaped(self, image: Image.Image) -> Image.Image:
        """An image as the processor gets it."""
        return pad_to_square(image, self.fill) if self.padded else image

    def arrays(self, found: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """A processor's output other than text."""
        return {name: as_array(value) for name, value in found.items() if name not in _TEXT}

    def describe_images(self) -> dict[str, Any]:
        """The processor's settings; an image's tokens depend on its size."""
        settings = {
            name: folders.plain(value)
            for name, value in self.processor.to_dict().items()
            if isinstance(value, bool | int | float | str | list | dict) and name not in ("chat_template", "auto_map")
        }
        return {
            **settings,
            "aspect": "pad" if self.padded else "own",
            "decoder": DECODER,
            "written": self.written,
            "tokens": folders.BY_SIZE,
            "token_id": self.image_token_id,
        }

    def load(self, dtype: torch.dtype, **settings: Any) -> Any:
        """Load the model."""
        from transformers import AutoModelForImageTextToText

        return load_weights(AutoModelForImageTextToText, self.folder, dtype=dtype, **settings)

    def model_inputs(
        self, sequences: Sequence[TokenizedSequence], images: Sequence[Sequence[SampleImage]], *, left: bool = False
    ) -> dict[str, Tensor]:
        """What the model takes for a padded batch, on the CPU; `images` are those of each sequence."""
        columns = text_inputs(sequences, pad=0 if self.image_token_id != 0 else 1, left=left)
        for name, marked in self.text_fields.items():
            types = [self.token_types(sequence, marked=marked) for sequence in sequences]
            columns[name] = padded(types, 0, left=left)
        return tensors(columns | self.joined([image.inputs for own in images for image in own]))

    def probe_inputs(self) -> dict[str, Tensor]:
        """What the model takes for a conversation with an image."""
        sequence, images = probe(self)
        return self.model_inputs([sequence], [images])

    def token_types(self, sequence: TokenizedSequence, *, marked: bool) -> NDArray[np.int64]:
        """The processor's type of each token; zeros unless `marked`: then images, or the answer after a prompt."""
        ids_T = sequence.input_ids_T
        if not marked:
            return np.zeros_like(ids_T)
        if self.sees_prompt_whole:
            answer = int(np.append(sequence.supervised_N, len(ids_T))[0])
            return np.repeat(np.array([0, 1], np.int64), [answer, len(ids_T) - answer])
        return np.asarray(self.processor.create_mm_token_type_ids([ids_T.tolist()])[0], np.int64)

    def joined(self, samples: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
        """The arrays of several samples; see `batches`."""
        return joined(samples)

    def _write_sizes(self, sizes: tuple[tuple[int, int], ...]) -> tuple[ImageTokens, ...]:
        """The tokens of images of these widths and heights in one sample."""
        return tuple(self.process([Image.new("RGB", size) for size in sizes])[1])

    def _embedded(self, image: ImageTokens) -> int:
        return int((image.ids == self.image_token_id).sum())


def paligemma_template(tokenizer: PreTrainedTokenizerFast) -> Template:
    """PaliGemma's wording: the prompt, a newline, and the answer with the tokenizer's end."""
    end = str(tokenizer.eos_token)
    return Template(PALIGEMMA, (), (), (Segment("\n"),), answer_prefix="", end=end, separator="", strips=ROLES)


def _embedded_id(config: Any, processor: Any, folder: Path) -> int:
    """The id of the tokens that image embeddings replace."""
    named = [getattr(config, name, None) for name in ("image_token_id", "image_token_index")]
    found = next((number for number in named if number is not None), None)
    if found is None:
        raise ModelError(f"{folder}/config.json: it names no image token: {folders.OTHER}")
    if found not in processor.image_token_ids and found >= len(processor.tokenizer):
        raise ModelError(
            f"{folder}/config.json: image_token_id is {found}, but the tokenizer has {len(processor.tokenizer)} "
            "tokens: use the tokenizer that belongs to the checkpoint"
        )
    return int(found)
