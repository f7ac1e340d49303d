"""A sequence as a request: text goes to OpenAI's completions endpoint, images to the one that takes tokens with images.

Both take our token ids. An image is sent as a lossless data URI and is one prompt token, which the server expands.
Shape suffixes: T tokens of a prompt.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from llavamod_offline.data.images import decode_image
from llavamod_offline.data.sample import Sample
from llavamod_offline.errors import ConfigError
from llavamod_offline.families.causal_lm import CausalLmFamily
from llavamod_offline.families.folder import preparing
from llavamod_offline.families.llava.family import LlavaFamily
from llavamod_offline.families.protocol import Family
from teacher_cache.engines.protocol import Request

COMPLETIONS, TOKENS = "/v1/completions", "/inference/v1/generate"


def image_uris(family: Family, sample: Sample) -> list[str]:
    """A sample's images at the size at which the model sees them, which the server's processor then leaves unchanged.

    Errors: `DataError` naming the sample.
    """
    if not sample.images:
        return []
    assert isinstance(family, LlavaFamily)  # see `check_served`
    uris = []
    for encoded in sample.images:
        image = decode_image(encoded, name=sample.key)
        with preparing(sample):
            uris.append(_data_uri(family.preprocessor.fit(image)))
    return uris


def check_served(family: Family) -> None:
    """Refuse teachers whose numbers from a server are not known to match transformers. Errors: `ConfigError`."""
    if isinstance(family, CausalLmFamily):
        return
    if not isinstance(family, LlavaFamily):
        raise ConfigError(
            f"{family.folder}: a server gives different numbers from transformers for this family, or has not been "
            "compared: set engine.kind=hf or vllm"
        )
    sizes = family.preprocessor.size[::-1]
    noise = Image.effect_noise(sizes, 64.0).convert("RGB")
    if family.preprocessor.fit(noise).tobytes() != noise.tobytes():
        raise ConfigError(
            f"{family.folder}: its image processor changes even images of its own output size, {sizes[0]}×{sizes[1]} "
            "pixels, so a server would change them again: set engine.kind=hf or vllm"
        )


def prompt_with_images(family: Family, request: Request, role: str) -> NDArray[np.int64]:
    """One role's tokens with one token for each image, as the server's processor takes them."""
    sample, encoder = request.sample, family.encoder
    return encoder.encode(sample, role, [encoder.image(1)] * len(sample.images)).input_ids_T


def scoring_request(
    prompt_T: NDArray[np.int64], uris: Sequence[str], *, model: str, listed: int
) -> tuple[str, dict[str, Any]]:
    """Path and body of a request for the `listed` most likely ids (-1: all) at every token of a prompt."""
    prompt, wanted = prompt_T.tolist(), {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": listed}
    body: dict[str, Any] = {"model": model, "return_token_ids": True}
    if not uris:
        return COMPLETIONS, body | wanted | {"prompt": prompt}
    images = [{"type": "image_url", "url": uri} for uri in uris]
    return TOKENS, body | {
        "token_ids": prompt,
        "content_parts": images,
        "sampling_params": wanted | {"detokenize": False},
    }


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
