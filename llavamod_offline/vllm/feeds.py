"""How a family's samples become vLLM's inputs: images one by one as we prepare them, or by vLLM's own processor.

vLLM tells a model which of a prompt's tokens are an image's and which of those its embeddings replace. The family's
processor in vLLM knows what is particular to it there, and how its arrays are batched. It gets our image processor, so
that pixels are the same, and finds its images in our prompt, which it leaves unchanged.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from llavamod_offline.data.images import decode_image
from llavamod_offline.data.sample import Sample
from llavamod_offline.errors import ModelError
from llavamod_offline.families.folder import preparing
from llavamod_offline.families.image_text import ImageTextFamily
from llavamod_offline.families.protocol import Family
from llavamod_offline.plural import counted
from llavamod_offline.vllm.inputs import TOKENS_FIELD, engine_input


class Feed(Protocol):
    """Prepares images, and prompts with them. `images` may run in threads."""

    @property
    def own_images(self) -> Callable[[Sample], Any] | None:
        """`images`, if it needs the engine; None if the family's own, which works in any process, will do."""
        ...

    def images(self, sample: Sample) -> Any:
        """A sample's images as `prompt` takes them. Errors: `DataError` naming the sample."""
        ...

    def prompt(self, input_ids_T: NDArray[np.int64], images: Any, *, name: str, salt: str) -> Any:
        """A prompt for vLLM's engine. `salt`: prompts share cached prefixes and images only within one salt.

        Errors: `ModelError` naming the prompt if its tokens do not match its images.
        """
        ...


def feed_of(family: Family, engine: Any, dtype: torch.dtype) -> Feed:
    """How an engine that runs a family's checkpoint gets its samples."""
    if isinstance(family, ImageTextFamily):
        return ProcessorFeed(family, engine)
    return PixelFeed(family, dtype)


@dataclass(frozen=True)
class PixelFeed:
    """Images one by one, as the family prepares them."""

    family: Family
    dtype: torch.dtype

    @property
    def own_images(self) -> None:
        """None: the family prepares them."""
        return None

    def images(self, sample: Sample) -> Any:
        """Decode and preprocess."""
        return self.family.images(sample)

    def prompt(self, input_ids_T: NDArray[np.int64], images: Any, *, name: str, salt: str) -> Any:
        """Runs of image tokens, each with its image."""
        image = self.family.image_token_id
        return engine_input(input_ids_T, images, image_token_id=image, name=name, salt=salt, dtype=self.dtype)


@dataclass(eq=False)
class ProcessorFeed:
    """A sample's images together, by the processor that vLLM has for the model.

    Errors: `ModelError` if it has none that can be given our image processor.
    """

    family: ImageTextFamily
    engine: Any
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._processor = self.engine.renderer.get_mm_processor()
        info = self._processor.info
        info.get_hf_processor().image_processor = self.family.processor.image_processor
        if info.get_hf_processor().image_processor is not self.family.processor.image_processor:
            raise ModelError(f"{self.family.folder}: vLLM prepares its images in its own way: use the engine hf")

    @property
    def own_images(self) -> Callable[[Sample], Any]:
        """`images`: vLLM's processor belongs to the engine."""
        return self.images

    def images(self, sample: Sample) -> Any:
        """What vLLM's processor gives: the model's arrays, and the tokens that it would write; None without images."""
        if not sample.images:
            return None
        from vllm.multimodal.processing import ProcessorInputs, TimingContext

        images = [self.family.shaped(decode_image(image, name=sample.key)) for image in sample.images]
        names = [str(number) for number in range(len(images))]  # vLLM would hash pixels to name them
        with preparing(sample), self._lock:
            items = self._processor.info.parse_mm_data({"image": images})
            inputs = ProcessorInputs([], items, {"image": cast("Any", names)})
            return self._processor._apply_hf_processor(inputs, TimingContext(enabled=False))

    def prompt(self, input_ids_T: NDArray[np.int64], images: Any, *, name: str, salt: str) -> Any:
        """Our tokens, with the places where vLLM's processor finds its own."""
        from vllm.inputs.engine import mm_input, tokens_input
        from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem

        prompt = input_ids_T.tolist()
        if images is None:
            return tokens_input(prompt, cache_salt=salt)
        items = images.kwargs["image"]
        with self._lock:
            found = self._processor._find_mm_placeholders(prompt, images.prompt_updates).get("image", [])
        places = [place.to_range() for place in found]
        counts = [place.get_num_embeds() for place in places]
        image_token = input_ids_T == self.family.image_token_id
        if len(places) != len(items) or not np.array_equal(_embedded(places, len(prompt)), image_token):
            raise ModelError(
                f"sample '{name}': vLLM finds tokens of {len(places)} of its {counted(len(items), 'image')}, and "
                f"{sum(counts)} that their embeddings replace, where its processor has {int(image_token.sum())}: it "
                "writes images differently: use the engine hf"
            )
        for item, count in zip(items, counts, strict=True):
            item[TOKENS_FIELD] = MultiModalFieldElem(torch.tensor(count), MultiModalBatchedField(keep_on_cpu=True))
        hashes = {"image": [f"{salt}/{number}" for number in range(len(items))]}
        return mm_input(prompt, images.kwargs, hashes, {"image": places}, cache_salt=salt)


def _embedded(places: Sequence[Any], length: int) -> NDArray[np.bool_]:
    """Which of a prompt's tokens are replaced by embeddings."""
    found_T = np.zeros(length, np.bool_)
    for place in places:
        own = True if place.is_embed is None else place.is_embed.numpy()
        found_T[place.offset : place.offset + place.length] = own
    return found_T
